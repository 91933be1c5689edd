"""People sign in, and see rows of their own only; what takes long is logged."""

import logging

from sqlrooms_server import Identity, Plugin, Policy, Role

log = logging.getLogger(__name__)

# In a program that is no example, whoever signs people in knows these.
USERS = {"secret of ada": "ada", "secret of ben": "ben"}

# What is in other schemas, and in files, is closed to them.
CUSTOMER = Role(
    name="customer",
    sql=Policy(
        read_only=True,
        files=False,
        extensions=False,
        schemas=frozenset({"main"}),
        kinds=frozenset({"SELECT"}),
    ),
)


class Rows(Plugin):
    name = "rows"

    def started(self):
        self.server.query("create schema if not exists private")
        self.server.query(
            "create or replace table private.orders as "
            "from (values ('ada', 3), ('ada', 4), ('ben', 5)) t(owner, amount)"
        )

    def authenticate(self, credentials):
        user = USERS.get(credentials.token)
        return Identity(user, CUSTOMER) if user else None

    def prepare_cursor(self, cursor, client):
        cursor.execute(
            "create temp table orders as from private.orders where owner = $1", [client.user]
        )

    def query_done(self, query, outcome):
        if outcome.running > 1.0:
            log.warning("%s waited %.1f s for %s", query.client.user, outcome.running, query.sql)
