"""What wraps a patched model: compilation, training, tensor parallelism, files; and what a step costs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import CONFIGS, LAYERS, WINDOW, make_model, shared_model
from support.guard import same_bytes
from support.llama import attention_calls, make_prompt, positions_of
from support.situations import generate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import gqa_kernels
from gqa_kernels import hf

pytestmark = pytest.mark.abi


#: transformers compiles the others in pieces, unpatched too: longrope and experts look at tensors on the host.
COMPILED = [family for family in CONFIGS if family not in ("phi3", "phi4", "gpt_oss")]


def static_steps(model: PreTrainedModel, ids: Tensor, prompt: int, step: Any) -> Tensor:
    """Logits of a prefill and then of one token at a time over a static cache."""
    past = StaticCache(model.config, max_cache_len=64)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with torch.no_grad():
        logits = [model(ids[:, :prompt], past_key_values=past).logits[:, -1]]
        for i in range(prompt, ids.shape[1]):
            out = step(ids[:, i : i + 1], position_ids=positions[:, i : i + 1], past_key_values=past)
            logits.append(out.logits[:, -1].clone())
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    ("family", "way"), [("llama", "attention function"), *((family, "patch") for family in COMPILED)]
)
def test_compiled_steps(device: str, family: str, way: str) -> None:
    """One graph without a break; on a GPU replayed as a CUDA graph. Windows fill up on the way."""
    model, ids = make_model(family, device), make_prompt(device, [WINDOW + 6])["input_ids"]
    expected = static_steps(model, ids, WINDOW - 3, model)
    torch._dynamo.reset()
    options = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    if way == "patch":
        report = gqa_kernels.patch(model)
    else:
        model.set_attn_implementation("gqa_kernels")
    compiled = torch.compile(model, fullgraph=True, **options)
    with gqa_kernels.record_launches() as launches:
        actual = static_steps(model, ids, WINDOW - 3, compiled)
    assert way != "patch" or not report.fallbacks
    if device == "cpu":  # replayed graphs do not pass through the launchers
        assert attention_calls(launches) == LAYERS * (ids.shape[1] - WINDOW + 4)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_falls_back(device: str, family: str, checkpointing: bool) -> None:
    """Gradients are those of the unpatched model, to the bit."""
    inputs, gradients = make_prompt(device, [26, 11]), []
    for patched in (False, True):
        model = make_model(family, device).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if patched:
            report = gqa_kernels.patch(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(a is b is None or same_bytes(a, b) for a, b in zip(*gradients))
    assert any("gradients are wanted" in reason for reason in report.fallbacks)


def test_tensor_parallel(tmp_path: Path) -> None:
    """Two processes share the heads; each attends with those it has."""
    folders = [tmp_path / family for family in ("llama", "qwen3", "gemma2")]
    for folder in folders:
        make_model(folder.name, "cpu", vocab_size=98).save_pretrained(folder)
    script = Path(__file__).parent / "support" / "tensor_parallel.py"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(gqa_kernels.__file__).parents[1]), *sys.path])
    run = subprocess.run(
        [sys.executable, *command, *map(str, folders)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("is the same") == 2 * len(folders)


def test_a_step_reads_what_is_filled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a static cache the op is given the length that is filled, not the size."""
    seen: list[tuple[int, int]] = []
    decode = gqa_kernels.gqa_attention_decode

    def recorded(q: Tensor, k_cache: Tensor, *args: Any, cache_seqlens: Tensor, **options: Any) -> Any:
        seen.append((int(cache_seqlens), k_cache.shape[1]))
        return decode(q, k_cache, *args, cache_seqlens=cache_seqlens, **options)

    monkeypatch.setattr(gqa_kernels, "gqa_attention_decode", recorded)
    model, ids = shared_model("llama", device), make_prompt(device, [22])["input_ids"]
    past = StaticCache(model.config, max_cache_len=400)
    with gqa_kernels.patched(model), torch.no_grad():
        model(ids[:, :20], past_key_values=past)
        for step in (20, 21):
            model(ids[:, step : step + 1], past_key_values=past)
    assert seen == [(20, 400)] * LAYERS + [(21, 400)] * LAYERS


@pytest.mark.parametrize("family", ["qwen2 sliding", "gemma2", "gpt_oss"])
def test_a_step_beyond_the_window_reads_nothing_on_the_host(
    device: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded batch, either cache, full windows: attention's lengths and padding stay on the device."""
    model, inputs = shared_model(family, device), make_prompt(device, [WINDOW + 5, WINDOW + 2])
    mask, token = inputs["attention_mask"], inputs["input_ids"][:, -1:]

    def forbidden(*args: Any) -> Any:
        raise AssertionError("a decode step read a tensor on the host")

    with gqa_kernels.patched(model) as report, torch.no_grad():
        for past in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=40)):
            model(**inputs, position_ids=positions_of(mask), past_key_values=past)
            layers = model.model.layers
            longer = torch.cat([mask, torch.ones_like(token)], dim=1)
            hidden = model.model.embed_tokens(token)
            angles = model.model.rotary_emb(hidden, positions_of(longer)[:, -1:])
            bounds = gqa_kernels.hf.masks.make_bounds(
                model.config, longer, past, batch=2, queries=1, device=hidden.device, position_ids=None, use_cache=True
            )
            with monkeypatch.context() as patcher:
                for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
                    patcher.setattr(torch.Tensor, name, forbidden)
                for layer in layers:
                    layer.self_attn(hidden, position_embeddings=angles, attention_mask=bounds, past_key_values=past)
    assert not report.fallbacks


def contents(model: nn.Module) -> dict[str, dict[str, int]]:
    """Every attribute of every module, as the identity of its object."""
    return {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()}


@pytest.mark.parametrize("family", CONFIGS)
def test_undone_to_the_very_objects(family: str) -> None:
    model = shared_model(family, "cpu")
    before, config = contents(model), copy.deepcopy(model.config.to_dict())
    report = gqa_kernels.patch(model)
    during = contents(model)
    assert during != before
    assert gqa_kernels.patch(model) is report and contents(model) == during
    gqa_kernels.unpatch(model)
    assert contents(model) == before and model.config.to_dict() == config
    told = json.loads(json.dumps(report.to_dict()))
    assert told["model"] == type(model).__name__ and len(told["modules"]) == len(report.modules)
    kept = {module["kind"] for module in told["modules"] if not module["replaced"]}
    assert kept == {"gemma2": {"Gemma2MLP"}, "gpt_oss": {"GptOssMLP"}}.get(model.config.model_type, set())
    assert f"{len(report.replaced)} modules replaced, {len(report.left_alone)} left alone" in str(report)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
def test_copies_and_files(tmp_path: Path, family: str) -> None:
    model, prompt = make_model(family, "cpu"), make_prompt("cpu", [9, 4])
    expected = generate(model, prompt, max_new_tokens=4)
    gqa_kernels.patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attention = other.model.layers[1].self_attn
        assert attention.forward.args[0] is attention
        assert torch.equal(generate(other, prompt, max_new_tokens=4), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(generate(loaded.eval(), prompt, max_new_tokens=4), expected)


def test_the_shipped_checkpoint(device: str) -> None:
    folder = Path(__file__).parents[1] / "examples" / "checkpoint"
    if not folder.exists():
        pytest.skip("the examples are not here")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    ids = torch.randint(3, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0)).to(device)
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 64}
    expected = generate(model, {"input_ids": ids}, **options)
    with gqa_kernels.patched(model) as report:
        assert torch.equal(generate(model, {"input_ids": ids}, **options), expected)
    with_function = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gqa_kernels").eval().to(device)
    with_function.generation_config.eos_token_id = None
    assert torch.equal(generate(with_function, {"input_ids": ids}, **options), expected)
    assert not report.fallbacks and not report.left_alone
    assert torch.equal(hf.generate(model, ids, **options), expected)


def test_models_patched_differently_do_not_meet() -> None:
    """Two families, and two of one family of which one keeps its own attention."""
    models = [make_model("qwen3", "cpu"), make_model("gemma2", "cpu"), make_model("qwen3", "cpu", head_dim=12)]
    prompt = make_prompt("cpu", [9, 4])
    expected = [generate(model, prompt, max_new_tokens=4) for model in models]
    reports = [gqa_kernels.patch(model) for model in models]
    for _ in range(2):
        for model, tokens in zip(models, expected):
            assert torch.equal(generate(model, prompt, max_new_tokens=4), tokens)
    assert [any("Attention" in m.kind for m in report.replaced) for report in reports] == [True, True, False]
    gqa_kernels.unpatch(models[0])
    with gqa_kernels.record_launches() as launches:
        generate(models[0], prompt, max_new_tokens=2)
        assert not launches
        generate(models[1], prompt, max_new_tokens=2)
    assert launches and not any(report.fallbacks for report in reports)
