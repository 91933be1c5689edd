from sqlrooms_server.client import connect

url = "ws://localhost:4000"
with connect(url, user="Ada") as ada, connect(url, user="Ben") as ben:
    news = ada.subscribe("poll")
    print(ada.call("vote", choice="tea"))
    print(ben.call("vote", choice="coffee"))
    print(ben.call("vote", choice="tea"))
    print([next(news).payload for _ in range(3)][-1])
