from sqlrooms_server.client import RequestFailed, connect

for user in ("ada", "ben"):
    with connect("ws://localhost:4000", token=f"secret of {user}") as db:
        print(user, db.query("select sum(amount)::int as sum from orders").to_pylist())
        try:
            db.query("from private.orders").to_pylist()
        except RequestFailed as error:
            print(error.code)
