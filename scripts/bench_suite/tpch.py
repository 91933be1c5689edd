"""Three queries of TPC-H at scale factor 1, and the answers that its specification gives."""

from __future__ import annotations

from decimal import Decimal
from math import isclose

import pyarrow as pa

from .answers import Query, WrongAnswer

TABLES = ("customer", "lineitem", "orders")

# Flag, status, then the sums of quantity, price, discounted price and charge, and the count.
_Q1 = """
A F 37734107 56586554400.73 53758257134.8700 55909065222.827692 1478493
N F 991417 1487504710.38 1413082168.0541 1469649223.194375 38854
N O 74476040 111701729697.74 106118230307.6056 110367043872.497010 2920374
R F 37719753 56568041380.90 53741292684.6040 55889619119.831932 1478870
"""
_Q1_DISCOUNTS = (0.049985295838, 0.050093426674, 0.049996586053, 0.050009405830)
_Q6 = "123141078.2283"
_Q3 = """
2456423 406181.0111
3459808 405838.6989
492164 390324.0610
1188320 384537.9359
2435712 378673.0558
4878020 378376.7952
5521732 375153.9215
2628192 373133.3094
993600 371407.4595
2300070 367371.1452
"""

# An average may be a double, or a decimal that was cut after six digits.
_CUT = 2e-5


def _is_close(found: object, right: float) -> bool:
    return isinstance(found, (float, Decimal)) and isclose(float(found), right, rel_tol=_CUT)


def _check_q1(table: pa.Table) -> None:
    rows = [list(row.values()) for row in table.to_pylist()]
    right = [line.split() for line in _Q1.split("\n") if line]
    for found, numbers, discount in zip(rows, right, _Q1_DISCOUNTS, strict=True):
        flag, status, *sums = numbers
        quantity, price, _, _, count = map(float, sums)
        means = (quantity / count, price / count, discount)
        exact = [str(found[0]), str(found[1]), *map(Decimal, (*found[2:6], found[9]))]
        if exact != [flag, status, *map(Decimal, sums)] or not all(
            map(_is_close, found[6:9], means)
        ):
            raise WrongAnswer(f"Q1: {found!r} instead of {numbers!r}")


def _check_q6(table: pa.Table) -> None:
    [found] = table.column(0).to_pylist()
    if found != Decimal(_Q6):
        raise WrongAnswer(f"Q6: {found!r} instead of {_Q6}")


def _check_q3(table: pa.Table) -> None:
    found = [list(row.values())[:2] for row in table.to_pylist()]
    right = [line.split() for line in _Q3.split("\n") if line]
    if found != [[int(order), Decimal(revenue)] for order, revenue in right]:
        raise WrongAnswer(f"Q3: {found!r} instead of {right!r}")


Q1 = Query(
    "select l_returnflag, l_linestatus, sum(l_quantity), sum(l_extendedprice),"
    " sum(l_extendedprice * (1 - l_discount)),"
    " sum(l_extendedprice * (1 - l_discount) * (1 + l_tax)),"
    " avg(l_quantity), avg(l_extendedprice), avg(l_discount), count(*)"
    " from lineitem where l_shipdate <= date '1998-09-02'"
    " group by l_returnflag, l_linestatus order by l_returnflag, l_linestatus",
    4,
    _check_q1,
    tables=TABLES,
)

Q6 = Query(
    "select sum(l_extendedprice * l_discount) from lineitem"
    " where l_shipdate >= date '1994-01-01' and l_shipdate < date '1995-01-01'"
    " and l_discount between 0.05 and 0.07 and l_quantity < 24",
    1,
    _check_q6,
    tables=TABLES,
)

Q3 = Query(
    "select l_orderkey, sum(l_extendedprice * (1 - l_discount)) as revenue, o_orderdate,"
    " o_shippriority from customer, orders, lineitem"
    " where c_mktsegment = 'BUILDING' and c_custkey = o_custkey and l_orderkey = o_orderkey"
    " and o_orderdate < date '1995-03-15' and l_shipdate > date '1995-03-15'"
    " group by l_orderkey, o_orderdate, o_shippriority"
    " order by revenue desc, o_orderdate limit 10",
    10,
    _check_q3,
    tables=TABLES,
)

QUERIES = {"q1": Q1, "q6": Q6, "q3": Q3}
