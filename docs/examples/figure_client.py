import json

from sqlrooms_server.client import connect

with connect("ws://localhost:4000") as db, db.open("wave") as figure:
    for drawing, references in figure:
        trace = json.loads(drawing)["data"][0]
        number, column = trace["x"]
        points = db.fetch(references[number]).to_arrow().column(column)
        print(trace["type"], len(points), points[0], points[-1])
        if len(points) < 1000:
            break
        figure.send(json.dumps({"range": [10, 20]}))
