"""A poll: people vote, and everybody sees the count at once."""

from sqlrooms_server import BadRequest, Plugin

plugin = Plugin("poll")


@plugin.hook
def started():
    plugin.server.query(
        "create table if not exists votes (voter varchar primary key, choice varchar)"
    )


@plugin.on("vote")
def vote(call):
    choice = call.message.get("choice")
    if choice not in ("tea", "coffee"):
        raise BadRequest("choice must be tea or coffee.")
    # Who has no name is known by the connection.
    voter = call.client.user or call.client.id
    plugin.server.query("insert or replace into votes values ($1, $2)", [voter, choice])
    rows = plugin.server.query("select choice, count(*) as n from votes group by all order by all")
    counts = {row["choice"]: row["n"] for row in rows.to_pylist()}
    plugin.server.channels.publish("poll", counts)
    return counts
