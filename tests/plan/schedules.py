"""A small program's lines: arguments, a product, a gather begun and ended.

They run on the toy chip of `conftest.py`: 64 FLOP/s, 100 bytes/s of HBM, 10 of a link.
"""

PRELUDE = """
%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r)
}
"""
ARGUMENTS = """
%a = f32[4,8]{1,0:S(1)} parameter(0)
%b = f32[8,16]{1,0:S(1)} parameter(1)
%x = f32[50]{0:S(1)} parameter(2)
"""
# 2 * 4 * 8 * 16 = 1024 FLOPs: 16 s.
DOT = "f32[4,16]{1,0:S(1)} dot(%a, %b), lhs_contracting_dims={1}"
# 200 bytes to one other device: 20 s.
GATHER = "replica_groups={{0,1}}, dimensions={0}"
GATHERED = "f32[100]{0:S(1)}"
START = f"(f32[50]{{0}}, {GATHERED}) all-gather-start(%x), {GATHER}"
ROOT = "ROOT %out = () tuple()"
# Where the gather is among the traffic.
KEY = ("all-gather", ("expert",))
