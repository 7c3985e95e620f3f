"""What a compiled program's text says is counted once for each run of its instructions."""

from jaxdiff.devices import program_text

TEXT = """\
HloModule jit_f, is_scheduled=true

%async_fused (p: bf16[8]) -> bf16[16] {
  ROOT %g.1 = bf16[16]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%all-reduce-scatter.1 (p: bf16[8]) -> bf16[4] {
  %sum = bf16[8]{0} all-reduce(%p), channel_id=6, to_apply=%add
  ROOT %part = bf16[4]{0} dynamic-slice(%sum, %c), dynamic_slice_sizes={4}
}

%body.inner (p: (s32[])) -> (s32[]) {
  %x = f32[4]{0} fusion(%p), backend_config={"window_config":{"estimated_cycles":"10"}}
  %o = (bf16[4]{0}, bf16[4]{0}, u32[]) collective-permute-start(%x), channel_id=5, pairs={{0,1}}
}

%cond.inner (p: (s32[])) -> pred[] {
  %c = u32[]{:T(128)} constant(3), metadata={op_name="jit(f)/sampling/while/body"}
}

%fused (p: f32[4]) -> f32[4] {
  %inside = f32[4]{0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body.step (p: (s32[])) -> (s32[]) {
  %y = f32[4]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"5"}
  %a = bf16[16]{0} fusion(%p), calls=%async_fused
  %b = bf16[4]{0} fusion(%p), calls=%all-reduce-scatter.1
  %g.2 = bf16[16]{0} all-gather(%p), channel_id=3, dimensions={0}
  %r = (f32[4]{0}) all-reduce-start(%y), channel_id=4, to_apply=%sum
  %d = f32[4]{0} all-reduce-done(%r)
  %k = bf16[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %w = (s32[]) while(%p), condition=%cond.inner, body=%body.inner, metadata={op_name="a/while"}
}

%cond.step (p: (s32[])) -> pred[] {
  %c = s32[]{:T(128)} constant(20)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %z = f32[4]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"7"}
  %s = (s32[]) while(%z), condition=%cond.step, body=%body.step, metadata={op_name="f/my/while"}
  %t = (s32[]) while(%z), condition=%cond.inner, body=%body.inner, metadata={op_name="f/while"}
}
"""


def test_cycles_are_those_of_all_turns_of_loops_without_the_insides_of_fusions():
    sampling = 20 * (5 + 3 * 10)
    assert program_text.cycles(TEXT, "my/while") == (20, sampling, 7 + 3 * 10)
    assert program_text.cycles(TEXT, "no/while") == (0, 0, sampling + 7 + 3 * 10)


def test_the_steps_of_an_exchange_count_once():
    assert program_text.exchanges(TEXT) == {
        "all-gather": 1,
        "all-reduce": 1,
        "collective-permute": 1,
        "reduce-scatter": 1,
    }


def test_exchanged_bytes_are_those_of_results_in_all_turns():
    gathered, reduced, scattered, permuted = 2 * 16, 2 * 4 * 4, 2 * 8, 2 * 4
    sampling = 20 * (gathered + reduced + scattered) + permuted * 20 * 3
    assert program_text.exchanged_bytes(TEXT, "my/while") == (20, sampling, permuted * 3)


def test_kernels_are_counted():
    assert program_text.kernels(TEXT) == 1
