"""hf.generate as it is called: stopping, sampling, streaming, refusals, weights that change, memory and waiting."""

from __future__ import annotations

import gc
import resource
import weakref
from typing import Any

import pytest
import torch
from support.families import make_model, shared_model
from support.llama import make_llama, make_prompt
from support.streamer import Recorder
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TextStreamer

import gqa_kernels
from gqa_kernels.hf import generate, release
from gqa_kernels.hf.generation import graphs

pytestmark = pytest.mark.abi

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.3},
]
IDS = ["plain", "top-p", "all"]
LONG_RUN = 1000  # steps


@pytest.mark.parametrize("check_every", [1, 5, 16])
def test_eos(device: str, check_every: int) -> None:
    """Rows end at different places; the answer is cut at the last end, as transformers cuts it."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4, 23])
    plain = generate(model, **inputs, max_new_tokens=40)
    eos = [int(plain[0, 23 + 9]), int(plain[1, 23 + 3]), int(plain[2, 23 + 21])]
    for ends in (eos, eos[:2], eos[0]):
        options = {"max_new_tokens": 40, "eos_token_id": ends, "pad_token_id": 5}
        expected = model.generate(**inputs, do_sample=False, **options)
        assert torch.equal(generate(model, **inputs, **options, check_every=check_every), expected)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 7
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    assert torch.equal(generate(model, **inputs, max_new_tokens=40, check_every=check_every), expected)
    assert torch.equal(generate(model, **inputs, max_new_tokens=40, eos_token_id=[]), plain)


def test_repetition_penalty_of_greedy_tokens(device: str) -> None:
    model, inputs = make_llama(device), make_prompt(device, [11, 11])
    for penalty in (1.4, 1.1):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=30, repetition_penalty=penalty)
        assert torch.equal(generate(model, **inputs, max_new_tokens=30, repetition_penalty=penalty), expected)


@pytest.mark.parametrize("settings", SAMPLING, ids=IDS)
def test_sampled_tokens_by_seed(device: str, settings: dict[str, Any]) -> None:
    """The same seed gives the same tokens: again, alone or in a batch, after other calls."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4, 23])
    options = {"max_new_tokens": 24, "do_sample": True, **settings}
    together = generate(model, **inputs, seed=[3, 4, 5], **options)
    assert torch.equal(generate(model, **inputs, seed=3, **options), together)
    assert not torch.equal(generate(model, **inputs, seed=6, **options), together)
    for row, length in enumerate([11, 4, 23]):
        if settings.get("repetition_penalty") and length < 23:
            continue  # padding counts for the penalty, as it does in transformers
        alone = generate(model, inputs["input_ids"][row : row + 1, 23 - length :], seed=3 + row, **options)
        assert torch.equal(alone[0, length:], together[row, 23:])
    assert torch.equal(generate(model, **inputs, seed=torch.tensor([3, 4, 5]), **options), together)


def test_seed_of_torch(device: str) -> None:
    model, inputs = make_llama(device), make_prompt(device, [11])
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn += [generate(model, **inputs, max_new_tokens=24, do_sample=True) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[4])


def test_settings_of_each_row(device: str) -> None:
    """Settings that change from call to call are those of the call, and a row's own."""
    model, inputs = make_llama(device), make_prompt(device, [11, 11])
    options = {"max_new_tokens": 24, "do_sample": True, "seed": [1, 1]}
    hot, cold = (generate(model, **inputs, temperature=t, top_p=p, **options) for t, p in ((2.0, 0.95), (0.1, 0.5)))
    mixed = generate(model, **inputs, temperature=[2.0, 0.1], top_p=torch.tensor([0.95, 0.5]), **options)
    assert torch.equal(mixed[0], hot[0]) and torch.equal(mixed[1], cold[1]) and not torch.equal(hot, cold)


@pytest.mark.parametrize("settings", [None, *SAMPLING], ids=["greedy", *IDS])
def test_graph_and_eager_steps(gpu: str, settings: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_llama(gpu), make_prompt(gpu, [11, 4, 23])
    options = {"max_new_tokens": 40, "do_sample": settings is not None, "seed": 3, **(settings or {})}
    replayed = generate(model, **inputs, **options)
    monkeypatch.setattr(graphs.Stepper, "_capture", lambda self, kind: _Eager(self, kind))
    release(model)
    assert torch.equal(generate(model, **inputs, **options), replayed)


class _Eager:
    def __init__(self, stepper: graphs.Stepper, kind: graphs.Kind) -> None:
        stepper.drawing.reserve(kind.active)
        self.replay = lambda: stepper._step(kind)


def test_same_draws_on_every_device(gpu: str) -> None:
    """float32 models whose logits differ in the last bits draw the same tokens, but where a draw falls on an edge."""
    options = {"max_new_tokens": 32, "do_sample": True, "seed": 7, "top_p": 0.9}
    drawn = [generate(make_llama(d), **make_prompt(d, [11, 4]), **options).cpu() for d in ("cpu", gpu)]
    assert torch.equal(*drawn)


def test_changed_weights_are_seen(device: str) -> None:
    """In place, behind autograd's back, as another parameter, or in another dtype: the next call has them."""
    model, inputs = make_model("qwen2", device), make_prompt(device, [11])
    attention = model.model.layers[0].self_attn

    def tokens() -> Tensor:
        actual = generate(model, **inputs, max_new_tokens=12)
        assert torch.equal(actual, model.generate(**inputs, max_new_tokens=12, do_sample=False))
        return actual

    seen = [tokens()]
    with torch.no_grad():
        attention.k_proj.weight.mul_(-1.0)
        seen.append(tokens())
        attention.v_proj.bias.data.mul_(-3.0)
        seen.append(tokens())
        attention.o_proj.weight = nn.Parameter(-attention.o_proj.weight)
        seen.append(tokens())
        attention.q_proj.bias.data = attention.q_proj.bias.data.flip(0)
        seen.append(tokens())
        model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
        seen.append(tokens())
    assert len({tuple(one.flatten().tolist()) for one in seen}) == len(seen)
    model.to(torch.bfloat16)
    assert generate(model, **inputs, max_new_tokens=12).shape == (1, 23)


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def test_models_that_are_refused() -> None:
    inputs = make_prompt("cpu", [11])

    def refused(model: nn.Module, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            generate(model, **inputs, max_new_tokens=4)

    model = make_llama("cpu")
    linear = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = Adapted(64, 128, bias=False)
    refused(model, r"model\.layers\.1\.mlp\.up_proj is a \S*Adapted, not a plain Linear")
    model.model.layers[1].mlp.up_proj = linear
    handle = linear.register_forward_hook(lambda *_: None)
    refused(model, "up_proj has hooks")
    handle.remove()
    linear.forward = linear.forward
    refused(model, "replaced on the instance")
    del linear.forward
    linear.to(torch.bfloat16)
    refused(model, "float32 on cpu and of torch.bfloat16")
    linear.to(torch.float32)
    linear.weight = nn.Parameter(linear.weight.t().contiguous().t())
    refused(model, "not contiguous")
    refused(model.train(), "training mode")
    refused(nn.ModuleDict({"model": model.eval()}), "ModuleDict, not a model of transformers")
    refused(make_llama("cpu", hidden_act="gelu"), "not SiLU")
    refused(make_llama("cpu", head_dim=12), "head_dim is 12")
    refused(model.model, "not a LlamaForCausalLM")
    refused(shared_model("gemma2", "cpu"), "family is 'gemma2'")
    refused(shared_model("gpt_oss", "cpu"), "family is 'gpt_oss'")
    refused(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97)), "family is 'gpt2'")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    refused(make_llama("cpu"), "hooks are set on all modules")
    handle.remove()


def test_calls_that_are_refused(device: str) -> None:
    """With the argument's name; the model serves the next call."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    expected = generate(model, **inputs, max_new_tokens=8)
    ids, right = inputs["input_ids"], make_prompt(device, [11, 4], side="right")
    for arguments, options, reason in [
        ((ids, None), {"max_new_tokens": 502}, "prompt of 11 and 502 new tokens exceed the model's 512 positions"),
        ((ids, None), {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ((ids, None), {"check_every": 0}, "check_every must be at least 1"),
        ((ids, None), {"do_sample": True, "top_p": [0.9, 0.9, 0.9]}, "top_p must be a number or hold one value"),
        ((ids[0], None), {}, "input_ids must be token ids"),
        ((ids[:, :0], None), {}, "input_ids must be token ids"),
        ((ids.float(), None), {}, "input_ids must be token ids"),
        ((ids, ids[:, 1:]), {}, "attention_mask must have the shape"),
        (tuple(right.values()), {}, "not left padding and then ones"),
        ((ids, torch.zeros_like(ids)), {}, "not left padding and then ones"),
    ]:
        with pytest.raises(ValueError, match=reason):
            generate(model, *arguments, **{"max_new_tokens": 8, **options})
        assert torch.equal(generate(model, **inputs, max_new_tokens=8), expected)
    dynamic = make_llama(device, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    dynamic.model.rotary_emb.original_max_seq_len = 64
    with pytest.raises(ValueError, match="dynamic rotary scaling"):
        generate(dynamic, **inputs, max_new_tokens=60)


@pytest.mark.parametrize("rows", [1, 3])
def test_streamer(device: str, rows: int) -> None:
    """The prompt, then one token of each row at a time, up to the last end."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4, 9][:rows])
    plain = generate(model, **inputs, max_new_tokens=40)
    for eos in (None, plain[:, 11 + 19].tolist()):
        theirs, ours = Recorder(), Recorder()
        options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": eos, "pad_token_id": 0}
        model.generate(**inputs, do_sample=False, streamer=theirs, **options)
        expected = generate(model, **inputs, streamer=ours, **options)
        assert ours.ended and len(ours.values) == len(theirs.values) == 1 + expected.shape[1] - 11
        assert all(torch.equal(a, b) for a, b in zip(ours.values, theirs.values))


def test_text_streamer(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Tokenizer:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "".join(f"{int(token)} " for token in tokens)

    model, inputs = make_llama(device), make_prompt(device, [5])
    tokens = generate(model, **inputs, max_new_tokens=20, streamer=TextStreamer(Tokenizer(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [str(token) for token in tokens[0, 5:].tolist()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("fail_at", [0, 1, 7])
def test_interrupted(device: str, fail_at: int, error: type[BaseException]) -> None:
    """The next call knows nothing of it."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    expected = generate(model, **inputs, max_new_tokens=30)
    with pytest.raises(error):
        generate(model, **inputs, max_new_tokens=30, streamer=Recorder(fail_at, error), check_every=4)
    assert torch.equal(generate(model, **inputs, max_new_tokens=30), expected)


def test_one_generation_at_a_time(device: str) -> None:
    model, inputs = make_llama(device), make_prompt(device, [11])

    class Nested(Recorder):
        def put(self, value: Tensor) -> None:
            with pytest.raises(ValueError, match="another generation of this model is running"):
                generate(model, **inputs, max_new_tokens=4)

    generate(model, **inputs, max_new_tokens=4, streamer=Nested())


def test_what_is_kept(device: str) -> None:
    """Caches and graphs of a few batch sizes, until they are released or the model is gone."""
    model = make_llama(device)
    expected = generate(model, **make_prompt(device, [11]), max_new_tokens=8)
    for rows in (2, 4, 8, 16, 17):
        generate(model, **make_prompt(device, [5] * rows), max_new_tokens=2)
    kept = graphs.kept_for(model)
    assert len(kept._steppers) == graphs.KEPT_STATES
    assert torch.equal(generate(model, **make_prompt(device, [11]), max_new_tokens=8), expected)
    release(model)
    assert not graphs.kept_for(model)._steppers
    assert torch.equal(generate(model, **make_prompt(device, [11]), max_new_tokens=8), expected)
    gone = weakref.ref(graphs.kept_for(model))
    del model, kept
    gc.collect()
    assert gone() is None


def test_long_runs_keep_their_memory_and_never_wait(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 further steps: no byte more, and no synchronisation between two looks at the tokens."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    model = make_llama(gpu, torch.bfloat16, max_position_embeddings=2048)
    inputs, options = make_prompt(gpu, [11, 4]), {"do_sample": True, "top_p": 0.9, "seed": 1, "check_every": 1100}
    generate(model, **inputs, max_new_tokens=2, **options)
    generate(model, **inputs, max_new_tokens=1010, **options)
    replay, memory = torch.cuda.CUDAGraph.replay, []

    def watched(graph: torch.cuda.CUDAGraph) -> None:
        torch.cuda.set_sync_debug_mode("error")
        replay(graph)
        memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", watched)
    torch.cuda.set_sync_debug_mode("default")
    try:
        drawn, on_host = _watched_session(model, inputs, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn == LONG_RUN and len(memory) >= LONG_RUN and len(set(memory)) == 1
    assert on_host[1] - on_host[0] < 4 << 20


def _watched_session(model: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """Tokens drawn, and the peak of the process's memory in bytes after a tenth of the steps and after all."""
    from gqa_kernels.hf.generation.drawing import Settings
    from gqa_kernels.hf.generation.generate import session_of

    settings = Settings(True, options["seed"], top_p=options["top_p"])
    with session_of(model, inputs["input_ids"], inputs["attention_mask"], settings, LONG_RUN + 1, None) as session:
        for _ in range(LONG_RUN // 10):
            session.step()
        before = _peak_bytes()
        for _ in range(LONG_RUN - LONG_RUN // 10):
            session.step()
        return session.drawn - 1, (before, _peak_bytes())


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_calls_on_several_streams(gpu: str) -> None:
    """They share the model's buffers, so that each waits for the one before."""
    model, prompts = make_llama(gpu), [make_prompt(gpu, [40], seed=seed)["input_ids"] for seed in range(4)]
    expected = [generate(model, ids, max_new_tokens=40) for ids in prompts]
    torch.cuda.synchronize()
    actual = []
    for ids in prompts:
        with torch.cuda.stream(torch.cuda.Stream()):
            actual.append(generate(model, ids, max_new_tokens=40))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_with_validation(device: str) -> None:
    """Checks on the host need steps that are not captured."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    expected = generate(model, **inputs, max_new_tokens=8)
    with gqa_kernels.validation():
        assert torch.equal(generate(model, **inputs, max_new_tokens=8), expected)


def test_exported_names() -> None:
    assert gqa_kernels.hf.generate is generate and gqa_kernels.hf.release is release
