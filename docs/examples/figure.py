"""A figure whose data stay on the server: a client that zooms gets the points of that range."""

import json

from sqlrooms_server import ObjectType, Plugin


class Figure:
    """A line over one column of a table, such as plotly draws it."""

    def __init__(self, table, x, y):
        self.table, self.x, self.y = table, x, y


class FigureType(ObjectType):
    name = "figure"

    def __init__(self, plugin):
        self.plugin = plugin

    def is_type(self, obj):
        return isinstance(obj, Figure)

    def create_client_connection(self, figure, stream):
        return Line(self.plugin.server, figure, stream)


class Line:
    """The figure as one client sees it."""

    def __init__(self, server, figure, stream):
        self.server, self.figure, self.stream = server, figure, stream
        self.show(float("-inf"), float("inf"))

    def on_data(self, payload, references):
        low, high = json.loads(payload)["range"]
        # The points from before are not drawn any more.
        self.stream.release()
        self.show(low, high)

    def on_close(self):
        pass

    def show(self, low, high):
        x, y, table = self.figure.x, self.figure.y, self.figure.table
        points = self.server.relation(
            f"select {x} as x, {y} as y from {table} where {x} between $1::double and $2::double"
            " order by 1",
            [str(low), str(high)],
        )
        # Where plotly has arrays, this names a column of a reference.
        trace = {"type": "scatter", "x": [0, "x"], "y": [0, "y"]}
        drawing = {"data": [trace], "layout": {"title": {"text": table}}}
        self.stream.send(json.dumps(drawing), [points])


class Figures(Plugin):
    def __init__(self):
        super().__init__("figures")
        self.object_type(FigureType(self))

    def started(self):
        self.server.query(
            "create table if not exists wave as "
            "select i / 10 as t, sin(i / 10) as v from range(1000) r(i)"
        )
        self.server.publish("wave", Figure("wave", "t", "v"))
