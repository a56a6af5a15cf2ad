"""Collectives in HLO text, in the forms that the compilers for CPU, GPU and TPU write them in."""

# ruff: noqa: E501 (programs are quoted as compilers print them)

from dcore_jax.plan.collectives import Collective, collectives

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
}

%inner (p: f32[8]) -> f32[8] {
  %reduce-scatter-start = ((f32[64,8]{1,0}), f32[16,8]{1,0}) reduce-scatter-start(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %done = f32[16,8]{1,0} reduce-scatter-done(%reduce-scatter-start)
}

%body (carry: (f32[4])) -> (f32[4]) {
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(step)/while/body/dot_general" stack_frame_id=1}
  %fusion.1 = f32[8]{0} fusion(%all-gather.1), kind=kLoop, calls=%inner
}

%condition (carry: (f32[4])) -> pred[] {
  %less = pred[] compare(%i, %n), direction=LT
}

%branch (p: f32[8]) -> f32[8] {
  %permute = (f32[10]{0}, f32[10]{0}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (f32[4]{0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"36"}}
  %conditional = f32[8]{0} conditional(%which, %p, %p), branch_computations={%branch, %add}
  %all-to-all-start = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}) all-to-all-start(%y), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %all-reduce.1 = (f32[10]{0}, f32[2]{0}) all-reduce(%u, %v), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_kinds_bytes_loops_and_groups():
  assert collectives(HLO) == [
    Collective('all-gather', 32 * 16 * 2, 36, True, 4, 'jit(step)/while/body/dot_general'),
    Collective('reduce-scatter', 64 * 8 * 4, 36, True, 4, ''),
    Collective('collective-permute', 40, 1, False, 1, ''),
    Collective('all-to-all', 8 * 128 * 2, 1, False, 8, ''),
    Collective('all-reduce', 48, 1, False, 4, ''),
  ]


def test_what_a_device_sends():
  gather, scatter, permute, exchange, reduce = (each.sent for each in collectives(HLO))
  assert gather == 36 * 1024 * 3 // 4 and scatter == 36 * 2048 * 3 // 4
  assert permute == 40 and exchange == 2048 * 7 // 8 and reduce == 2 * 48 * 3 // 4


def test_a_loop_of_unknown_length_counts_once():
  [first, *_] = collectives(HLO.replace(', backend_config={"known_trip_count":{"n":"36"}}', ''))
  assert first.times == 1 and first.in_loop


COUNTED = """HloModule jit_step, is_scheduled=true

%window (carry: (bf16[4,8], u32[], u32[])) -> (bf16[4,8], u32[], u32[]) {
  %carry = (bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%carry), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%counter, %two), metadata={op_name="jit(step)/add"}
  %permute-start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%part), source_target_pairs={{0,1},{1,0}}
  ROOT %tuple = (bf16[4,8]{1,0}, u32[]{:T(128)}, /*index=2*/u32[]{:T(128)}) tuple(%permute-done, %next, /*index=2*/%counter), backend_config={}
}

%window_condition (carry: (bf16[4,8], u32[], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%carry.1), index=1
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %eight), direction=LT
}

%layer (carry: (s32[])) -> (s32[]) {
  %while.2 = (bf16[4,8]{1,0}, u32[], u32[]) while(%inside), condition=%window_condition, body=%window
  %one = s32[]{:T(128)} constant(1)
  %index.1 = s32[]{:T(128)} add(%index, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}) tuple(%index.1)
}

%layer_condition (carry: (s32[])) -> pred[] {
  %layers = s32[]{:T(128)} constant(36)
  %index.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%index.2, %layers), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[]) while(%tuple.2), condition=%layer_condition, body=%layer
}
"""


def test_turns_that_only_the_condition_tells():
  assert collectives(COUNTED) == [
    Collective('collective-permute', 4 * 8 * 2, 36 * 8 // 2, True, 1, '')
  ]
  # A loop that may end before: its condition is not this comparison alone.
  assert collectives(COUNTED.replace('ROOT %less = ', '%less = '))[0].times == 36
