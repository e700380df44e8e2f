"""Properties of maskalign.py and train.py; sizes are drawn pairwise distinct."""
import copy
import json
import math
import os
import re
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2
from hypothesis import assume, given, settings, strategies as st

import maskalign as ma
import train

settings.register_profile("fast", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fast")
HERE = Path(__file__).parent


def small(**options):
    return ma.ViT(**{**dict(image_size=12, patch_size=4, dim=8, depth=3, heads=2), **options})


def teacher_of(network, levels=2):
    return ma.Teacher(network, levels)


def start(*argv, ranks=1, options=(), script=HERE / "train.py", **more):
    """The real script in a real process, or in as many as there are ranks."""
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])  # a free one
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port,
              *options] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launch, str(script), *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def run(*argv, code=0, ranks=1, **more):
    process = start(*argv, ranks=ranks, **more)
    done = subprocess.CompletedProcess(argv, 0, *process.communicate())
    assert process.returncode == code or ranks > 1 and code and process.returncode, done.stderr
    return done


def main(*argv):
    """The same in this process."""
    train.main(list(map(str, argv)))


# --- 3.2 masking --------------------------------------------------------------------------------

@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 99))
def test_keep_is_distinct_in_range_and_exact(batch, patches, percent):
    count = int(patches * (1 - Fraction(percent, 100)))
    assume(count)
    for keep in (ma.random_keep(batch, patches, percent / 100),
                 ma.attentive_keep(torch.rand(batch, patches), percent / 100)):
        assert keep.shape == (batch, count)
        assert keep.min() >= 0 and keep.max() < patches
        assert all(len(set(row)) == count for row in keep.tolist())


def test_keep_counts_of_the_paper_and_bad_ratios():
    assert ma.visible(196, 0.7) == 58 and ma.visible(10, 0.9) == 1
    for patches, ratio in ((10, 0.95), (10, 1.0), (10, -0.1), (10, 1.5)):
        with pytest.raises(ValueError, match="mask ratio"):
            ma.visible(patches, ratio)


@given(st.integers(0, 20))
def test_zero_attention_is_kept_only_when_positive_runs_out(positive):
    attention = torch.zeros(5, 20)
    attention[:, 3:3 + positive] = 0.01
    positive = int((attention[0] > 0).sum())
    for row in ma.attentive_keep(attention, 0.5).tolist():
        assert len(set(row)) == 10
        assert sum(3 <= i < 3 + positive for i in row) == min(positive, 10)


def test_keep_frequency_matches_sampling_without_replacement():
    torch.manual_seed(0)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    keep = ma.attentive_keep(weights.expand(40000, 4), 0.5)
    found = torch.stack([(keep == i).any(1).float().mean() for i in range(4)])
    exact = torch.tensor([sum(weights[i] * weights[j] / (1 - weights[i]) * (n in (i, j))
                              for i in range(4) for j in range(4) if i != j) for n in range(4)])
    assert (found - exact).abs().max() < 0.01
    assert (found[:-1] > found[1:]).all()


# --- 3.1 the networks ---------------------------------------------------------------------------

@given(st.integers(1, 4), st.integers(5, 9), st.integers(10, 13), st.randoms())
def test_take_equals_loops(batch, patches, width, random):
    tokens = torch.arange(batch * (1 + patches) * width).view(batch, 1 + patches, width)
    keep = torch.tensor([random.sample(range(patches), 3) for _ in range(batch)])
    loops = [[tokens[b, 0].tolist()] + [tokens[b, 1 + i].tolist() for i in keep[b].tolist()]
             for b in range(batch)]
    assert ma.take(tokens, keep).tolist() == loops


def test_dropped_patches_change_nothing_and_all_kept_is_no_mask():
    network, images = small(), torch.rand(2, 3, 12, 12)
    keep = torch.tensor([[0, 4], [8, 2]])
    other = torch.rand(2, 3, 12, 12)
    for b in range(2):
        for i in keep[b].tolist():
            rows, columns = slice(i // 3 * 4, i // 3 * 4 + 4), slice(i % 3 * 4, i % 3 * 4 + 4)
            other[b, :, rows, columns] = images[b, :, rows, columns]
    for x, y in zip(network(images, keep), network(other, keep)):
        assert torch.equal(x, y)
    for x, y in zip(network(images, torch.arange(9).expand(2, -1)), network(images)):
        assert torch.allclose(x, y, atol=1e-6)


def test_a_frozen_network_draws_nothing_at_random():
    network, images = small(drop_path=0.5), torch.rand(2, 3, 12, 12)
    for frozen in (network.eval(), teacher_of(network)):
        before = torch.get_rng_state()
        frozen(images)
        assert torch.equal(before, torch.get_rng_state())
    network.train()(images)
    assert not torch.equal(before, torch.get_rng_state())


def test_permuting_keep_permutes_outputs_and_leaves_the_loss():
    network, images = small(), torch.rand(2, 3, 12, 12)
    model = ma.MaskAlign(network, teacher := teacher_of(small(dim=12)), mask_ratio=0.5)
    keep, order = torch.tensor([[0, 4, 7, 3], [8, 2, 1, 5]]), torch.tensor([2, 0, 3, 1])
    for x, y in zip(network(images, keep), network(images, keep[:, order])):
        assert torch.allclose(ma.take(x, order.expand(2, -1)), y, atol=1e-5)
    levels, attention = teacher(images)
    losses = [model(images, levels, attention, k) for k in (keep, keep[:, order])]
    assert torch.allclose(*losses, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_timm_gives_the_same_tokens(name):
    ours, theirs = ma.vit(name, depth=3), timm.create_model(name, num_classes=0, depth=3).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        tokens = ours.norm(ours(images)[-1])
        expected = theirs.forward_features(ma.normalise(images, *ma.IMAGENET_MEAN_STD))
    assert torch.allclose(tokens, expected, atol=1e-5)


def test_sincos_positions():
    table = ma.sincos_2d(8, (2, 3))
    assert table.shape == (7, 8) and not table[0].any()
    row, column = 1, 2
    omega = [1.0, 10000 ** -0.5]
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
    assert torch.allclose(table[1 + row * 3 + column], torch.tensor(expected))


@pytest.mark.parametrize("name", ["vit_digits_patch4_32", "ViT-M-16"])
def test_teacher_is_frozen_and_attention_is_the_naive_softmax(name):
    with pytest.warns(UserWarning, match="random weights"):
        teacher = ma.load_teacher(name, None, levels=3)
    images = torch.rand(2, 3, *teacher.image_size)
    seen = []
    attn = teacher.network.blocks[-1].attn
    attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = [p.clone() for p in teacher.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()]
    levels, attention = teacher.train()(images)
    teacher(images)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()]
    assert not teacher.outputs and not teacher.attention
    if name in ma.VITS:
        assert all(map(torch.equal, levels, teacher.network(images)[-3:]))
    assert not any(m.training for m in teacher.modules())
    x = seen[0]
    weight, bias = (attn.qkv.weight, attn.qkv.bias) if hasattr(attn, "qkv") else (
        attn.in_proj_weight, attn.in_proj_bias)
    q, k, _ = (x @ weight.T + bias).chunk(3, dim=-1)
    heads = [(q[..., i] @ k[..., i].transpose(1, 2) / len(i) ** 0.5).softmax(-1)[:, 0, 1:]
             for i in torch.arange(teacher.dim).chunk(attn.num_heads)]
    assert torch.allclose(attention, torch.stack(heads).mean(0), atol=1e-6)
    student = small(image_size=teacher.image_size, patch_size=teacher.image_size[0]
                    // teacher.grid[0])
    model = ma.MaskAlign(student, teacher)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss = model(images, levels, attention)
    loss.backward()
    optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(before, teacher.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in key for key in model.state_dict())
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trainable.values())
    assert {"student.cls_token", "align.matrix"} <= set(trainable)


@pytest.mark.parametrize("name", ["vit_digits_patch4_32", "ViT-M-16"])
def test_teacher_in_bf16_weights_stays_in_bf16(name):
    with pytest.warns(UserWarning, match="random weights"):
        teacher = ma.load_teacher(name, None, levels=2)
    images = torch.randint(0, 256, (2, 3, *teacher.image_size), dtype=torch.uint8)
    exact, exact_attention = teacher(images)
    levels, attention = teacher.to(torch.bfloat16)(images)
    assert all(level.dtype == torch.bfloat16 for level in levels)
    assert attention.dtype == torch.float32
    assert torch.allclose(attention, exact_attention, atol=2e-3)
    for a, b in zip(exact, levels):
        assert (ma.whiten(a) - ma.whiten(b)).abs().mean() < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_bf16_has_the_loss_and_gradients_of_fp32(seed):
    torch.manual_seed(seed)
    model = ma.MaskAlign(ma.vit("vit_digits_patch4_32", drop_path=0.1), teacher := ma.load_teacher(
        "vit_digits_patch4_32", None, levels=3))
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    noise = torch.rand(64, 64 + 8)
    levels, attention = teacher(images)
    keep = ma.attentive_keep(attention, 0.7, noise[:, :64])  # in bf16 now and then another
    results = []
    for enabled in (False, True):
        seen = teacher.to(torch.bfloat16)(images) if enabled else (levels, attention)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images, *seen, keep, noise)
        results.append((loss, torch.autograd.grad(loss, [
            p for p in model.parameters() if p.requires_grad])))
    (exact, exact_gradients), (loss, gradients) = results
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 1e-3
    for a, b in zip(exact_gradients, gradients):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.05 * a.norm()


def test_sizes_and_colours_are_timms():
    for name in [name for name in ma.VITS if "digits" not in name]:
        with torch.device("meta"):
            network = timm.create_model(name)
        patches, heads = network.patch_embed, network.blocks[0].attn.num_heads
        assert ma.VITS[name] == dict(
            image_size=patches.img_size[0], patch_size=patches.patch_size[0],
            dim=network.embed_dim, depth=len(network.blocks), heads=heads)
    assert ma.IMAGENET_MEAN_STD == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.allclose(ma.normalise(images, *ma.IMAGENET_MEAN_STD),
                          v2.functional.normalize(images / 255, *ma.IMAGENET_MEAN_STD), atol=1e-6)


def test_initial_weights_are_xaviers():
    network = ma.vit("vit_digits_patch4_32")
    for module in network.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            rows, columns = module.weight.flatten(1).shape
            deviation = (2 / (rows + columns)) ** 0.5
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.05)
        if isinstance(module, torch.nn.Linear):
            assert not module.bias.any()


def test_drop_path_follows_its_noise():
    network, noise = small(drop_path=0.5), torch.rand(50, 6)
    for s, gates in enumerate(network.train().gates(torch.zeros(50, 1), noise)):
        p = 0.25 * s
        assert torch.equal(gates.squeeze(), (noise[:, 2 * s:2 * s + 2] >= p).T / (1 - p))


def test_a_clip_teacher_sees_clips_colours_and_size(monkeypatch):
    import open_clip
    with pytest.warns(UserWarning, match="random weights"):
        teacher = ma.load_teacher("ViT-M-16", None)
    seen, images = [], torch.rand(1, 3, 112, 112)
    monkeypatch.setattr(teacher.network, "forward", lambda x: seen.append(x) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher(images)
    expected = torch.nn.functional.interpolate(v2.functional.normalize(
        images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD), 224, mode="bicubic")
    assert torch.allclose(seen[0], expected, atol=1e-5) and teacher.levels == 5


def test_dino_stands_for_its_address(monkeypatch):
    sources = []
    monkeypatch.setattr(ma, "load_encoder", lambda network, source: sources.append(source))
    for weights in ("dino", "file.pt"):
        ma.load_teacher("vit_digits_patch4_32", weights, 1)
    assert sources == [ma.DINO, "file.pt"]


# --- 3.3 alignment ------------------------------------------------------------------------------

@given(st.floats(0.5, 4), st.floats(-3, 3))
def test_whiten(scale, shift):
    y = torch.randn(3, 5, 64, dtype=torch.float64) * 3
    white = ma.whiten(y)
    assert torch.allclose(white.mean(-1), torch.zeros(3, 5).double(), atol=1e-6)
    assert torch.allclose(white.var(-1, unbiased=False), torch.ones(3, 5).double(), atol=1e-4)
    assert torch.allclose(ma.whiten(scale * y + shift), white, atol=1e-4)


@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 6))
def test_dynamic_alignment_equals_loops(student_depth, teacher_depth, levels):
    assume(levels <= teacher_depth)
    align = ma.DynamicAlignment(student_depth, 7, teacher_depth, 11, levels).double()
    features = [torch.randn(2, 3, 7, dtype=torch.float64) for _ in range(student_depth)]
    out = torch.stack(list(align(features)))
    loops = torch.stack([align.adaptors[k](sum(align.matrix[k, s] * features[s]
                                               for s in range(student_depth)))
                         for k in range(levels)])
    assert torch.allclose(out, loops)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weight).sum(), align.parameters()) for x in (out, loops)]
    assert all(torch.allclose(a, b) for a, b in zip(*grads))
    ones = (align.matrix - 0.01).round()
    assert (ones.sum(1) == 1).all() and ones[-1, -1] == 1
    if student_depth == teacher_depth:
        assert torch.equal(ones, torch.eye(teacher_depth).double()[-levels:])


def test_alignment_of_unequal_depths():
    assert (ma.DynamicAlignment(24, 4, 12, 4, 5).matrix > 1).nonzero()[:, 1].tolist() == [
        15, 17, 19, 21, 23]
    assert (ma.DynamicAlignment(12, 4, 24, 4, 5).matrix > 1).nonzero()[:, 1].tolist() == [
        9, 10, 10, 11, 11]


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=9))
def test_align_loss_is_the_piecewise_formula(values):
    d = torch.tensor(values, dtype=torch.float64)
    target = torch.randn(len(values), dtype=torch.float64)
    expected = sum(0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5 for x in values) / len(values)
    assert ma.align_loss(target + d, target).item() == pytest.approx(expected, abs=1e-9)
    assert ma.align_loss(target, target) == 0


def test_align_loss_gradcheck():
    pred = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: ma.align_loss(p, torch.zeros(3, 4).double()), pred)


def test_the_kind_of_mask_is_what_was_asked_for():
    teacher, images, noise = teacher_of(small(dim=12)), torch.rand(2, 3, 12, 12), torch.rand(2, 15)
    levels, _ = teacher(images)
    attention = torch.zeros(2, 9)
    attention[:, [1, 3, 5, 8]] = 0.25
    for mask, score in (("attentive", noise[:, :9] * attention), ("random", noise[:, :9])):
        model, seen = ma.MaskAlign(small(), teacher, mask, 0.5), []
        model.student.register_forward_pre_hook(lambda module, args: seen.append(args))
        model(images, levels, attention, noise=noise)
        assert seen[0][1].tolist() == score.topk(4, dim=1).indices.tolist()
        assert torch.equal(seen[0][2], noise[:, 9:])


def test_the_loss_is_the_papers_formula():
    torch.manual_seed(0)
    model = ma.MaskAlign(small(), teacher := teacher_of(small(dim=12)), mask_ratio=0.5)
    images, keep = torch.rand(2, 3, 12, 12), torch.tensor([[0, 4, 7, 3], [8, 2, 1, 5]])
    levels, attention = teacher(images)
    levels = [3 * level + 1 for level in levels]
    x, expected = model.student(images, keep), 0
    for k in range(2):
        p = model.align.adaptors[k](sum(model.align.matrix[k, s] * x[s] for s in range(3)))
        y = torch.stack([levels[k][b, [0, *(keep[b] + 1)]] for b in range(2)])
        y = (y - y.mean(-1, True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        d = (p - y).abs()
        expected += torch.where(d <= 1, d * d / 2, d - 0.5).mean() / 2
    assert torch.allclose(model(images, levels, attention, keep), expected, atol=1e-6)


# --- train.py -----------------------------------------------------------------------------------

@given(st.integers(2, 400), st.floats(0, 0.9), st.floats(1e-4, 1), st.floats(0, 1e-4))
def test_schedule(steps, share, peak, floor):
    warmup = int(steps * share)
    rates = [train.learning_rate(s, steps, warmup, peak, floor) for s in range(steps)]
    if warmup:
        assert rates[warmup - 1] == pytest.approx(peak)
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1:]))
    assert rates[-1] == pytest.approx(floor)


def test_parameter_groups_are_a_partition():
    model = ma.MaskAlign(small(), teacher_of(small()), mask_ratio=0.5)
    groups = train.param_groups(model, 0.05, 0.5)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {id(p) for n, p in model.named_parameters()
                         if p.requires_grad and (p.ndim == 1 or n == "align.matrix")}


def test_layer_decay_scales_by_depth():
    model = train.Classifier(small(), 5, probe=False)
    scale = {id(p): g["scale"] for g in train.param_groups(model, 0.05, 0.5) for p in g["params"]}
    for name, power in (("student.cls_token", 4), ("student.patch_embed.proj.weight", 4),
                        ("student.blocks.0.attn.qkv.weight", 3), ("student.blocks.2.norm2.bias", 1),
                        ("align.1.weight", 0)):
        assert scale[id(model.get_parameter(name))] == 0.5 ** power


def digits(out, *more):
    return ("--data", "digits:96", "--out", out, "--batch-size", 24, "--epochs", 3, "--device",
            "cpu", "--eval-every", 100, *more)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    train.main(list(map(str, digits(out, "--task", "finetune"))))
    return out / "student.pt"


def weights(out):
    return torch.load(Path(out) / "student.pt")


def same(a, b, atol):
    return all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a) and a.keys() == b.keys()


def test_world_size_accumulation_and_resume_agree(tmp_path, teacher_file, capsys):
    base = ("--teacher-weights", teacher_file, "--drop-path", 0.2)
    main(*digits(tmp_path / "one", *base))
    main(*digits(tmp_path / "micro", *base, "--micro-batch", 6, "--workers", 1))
    run(*digits(tmp_path / "two", *base), ranks=2)
    one = weights(tmp_path / "one")
    assert same(one, weights(tmp_path / "micro"), 2e-4)
    assert same(one, weights(tmp_path / "two"), 2e-4)
    lines = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [10, 12]
    assert {"epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "knn"} <= set(lines[1])
    # the same run, cut after step 5 as SIGTERM would cut it
    arguments = train.parse(list(map(str, digits(tmp_path / "cut", *base, "--save-every", 5))))
    real = train.learning_rate
    try:
        train.learning_rate = lambda step, *rest: real(step, *rest) if step < 7 else 1 / 0
        with pytest.raises(ZeroDivisionError):
            train.train(arguments)
    finally:
        train.learning_rate = real
    main(*digits(tmp_path / "cut", *base, "--save-every", 5))
    assert same(one, weights(tmp_path / "cut"), 0)
    main(*digits(tmp_path / "cut", *base))
    assert "finished" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SystemExit):
        main(*digits(tmp_path / "cut", *base, "--seed", 1))
    assert "seed 0 -> 1" in capsys.readouterr().err


def test_demo_hands_its_flags_to_teacher_and_student(tmp_path, capsys):
    main("--epochs", 0.01, "--micro-batch", 32, "--device", "cpu", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("12 steps, from 0, of 64 = 1 processes x 2 x 32") == 2
    assert [logged(tmp_path / part)[-1] for part in ("teacher", "student")] == [12, 12]
    assert re.search(r"untrained student \d+\.\d %, trained student \d+\.\d %, teacher \d+\.\d %",
                     printed)


@pytest.mark.parametrize("argv, says", [
    (("--data", "/nowhere"), "no such folder"),
    (("--teacher", "nope"), "teacher nope is no known ViT"),
    (("--student", "nope"), "unknown ViT"),
    (("--mask-ratio", "0.999"), "no visible patch"),
    (("--levels", "9"), "levels"),
    (("--teacher", "ViT-B-16", "--teacher-weights", "openai"), "-quickgelu"),
    (("--teacher", "RN50", "--teacher-weights", "random"), "CLS"),
    (("--student", "vit_tiny_patch16_224"), "grids differ"),
    (("--layer-decay", "1.5"), "--layer-decay"),
    (("--batch-size", "0"), "--batch-size"),
    (("--epochs", "inf"), "--epochs inf"),
    (("--warmup-epochs", "inf"), "--warmup-epochs inf"),
    (("--blr", "nan"), "--blr nan"),
    (("--min-lr", "-1"), "--min-lr -1.0"),
    (("--data", "digits:0"), "digits:0"),
    (("--data", "digits:x"), "digits:x"),
    (("--device", "gpu"), "--device gpu"),
    (("--drop-path", "1"), "--drop-path 1.0"),
    pytest.param(("--device", "cuda"), "--device cuda", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="has a GPU")),
])
def test_bad_input_is_one_line(tmp_path, capsys, teacher_file, argv, says):
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, digits(tmp_path / "out", "--teacher-weights", teacher_file)), *argv])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and says in error[0]


def test_an_error_is_written_at_once(monkeypatch):
    """Otherwise the words of two ranks mix where Python does not buffer (PYTHONUNBUFFERED)."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))
    with pytest.raises(SystemExit):
        main("--batch-size", 0)
    assert written == ["train.py: error: --batch-size 0 is out of range\n"]


def test_digits_are_fixed_by_a_count_and_nothing_leaks():
    pixels = lambda source, epoch: source.__getitems__([(epoch, i) for i in range(9)])[0]
    for data, count, fixed in (("digits", 76800, False), ("digits:50", 50, True)):
        sources = train.open_data(train.parse(["--data", data]), (32, 32))
        assert [len(source.names) for source in sources] == [count, 2000, 1000]
        assert [torch.equal(pixels(s, 0), pixels(s, 1)) for s in sources] == [fixed, True, True]
        assert not any(torch.equal(pixels(sources[a], 0), pixels(sources[b], 0))
                       for a, b in ((0, 1), (0, 2), (1, 2)))


def test_knn_is_the_vote_by_loops():
    def encoder(images):  # the first channel is the [CLS] token, the others are two patches
        x = images.float().flatten(2)
        return [x.sqrt(), x]
    bank, val = (train.Digits(count, (32, 32), count, True) for count in (200, 300))
    features = []
    for source in (bank, val):
        x = source.__getitems__([(0, i) for i in source.names])[0].float().flatten(2)
        x = x[:, 1:].mean(dim=1)
        x = (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        features.append(x / x.norm(dim=1, keepdim=True))
    right = 0
    for i, row in enumerate((features[1] @ features[0].T).tolist()):
        votes = [0] * 10
        for j in sorted(range(200), key=lambda j: -row[j])[:20]:
            votes[j % 10] += math.exp(row[j] / 0.07)
        right += votes.index(max(votes)) == i % 10
    found = train.knn(encoder, bank, val, train.parse(["--workers", "0"]), torch.device("cpu"))
    assert found == pytest.approx(100 * right / 300)


# --- Weights that travel ------------------------------------------------------------------------

def formats(state):
    """The same encoder as each kind of checkpoint holds it."""
    junk = torch.zeros(2)
    return {
        "ours": {"student": state, "align": {"matrix": junk}, "step": 3},
        "timm": {**state, "head.weight": junk},
        "mae": {"model": {**state, "mask_token": junk, "decoder_embed.weight": junk}, "epoch": 1},
        "dino": {"teacher": {f"module.backbone.{k}": v for k, v in state.items()},
                 "student": {f"module.backbone.{k}": 0 * v for k, v in state.items()}},
        "official": {"model": {**{f"model.{k}": v for k, v in state.items()},
                               "distill_weights": junk, "clip_model.x": junk}},
        "official pre-training": {"model": {**state, "distill_heads.0.weight": junk}}}


@pytest.mark.parametrize("kind", formats({}))
def test_every_format_of_an_encoder_loads(tmp_path, kind):
    source, target = small(), small()
    torch.save(formats(source.state_dict())[kind], tmp_path / "file.pt")
    aside = ma.load_encoder(target, tmp_path / "file.pt")
    assert same(source.state_dict(), target.state_dict(), 0)
    assert aside and not any(key.startswith(("blocks", "patch_embed")) for key in aside)


def test_positions_are_resampled_to_rectangles(tmp_path):
    torch.save(small(image_size=16).state_dict(), tmp_path / "file.pt")
    target = small(image_size=(12, 20))
    ma.load_encoder(target, tmp_path / "file.pt")
    old = ma.sincos_2d(8, 4)[1:].T.view(1, 8, 4, 4)
    new = torch.nn.functional.interpolate(old, (3, 5), mode="bicubic", align_corners=False)
    assert torch.allclose(target.pos_embed[0, 1:].T.view(1, 8, 3, 5), new, atol=1e-6)


class Evil:
    def __reduce__(self):
        return (Path("evil-was-here").touch, ())


def test_wrong_files_are_errors_and_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(small(depth=2).state_dict(), "shallow.pt")
    torch.save({"student": Evil()}, "evil.pt")
    Path("text.pt").write_text("no weights")
    for file, says in (("shallow.pt", "blocks.2.norm1.weight"), ("evil.pt", "not read"),
                       ("text.pt", "not read"), ("missing.pt", "missing.pt")):
        with pytest.raises(ValueError, match=says):
            ma.load_encoder(small(), file)
    Path("out").mkdir()
    shutil.copy("evil.pt", "out/last.pt")
    with pytest.raises(SystemExit):
        main(*digits("out", "--task", "finetune"))
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize("patch, student_depth", [(16, 4), (14, 5)])
def test_clip_teacher_from_a_file_in_open_clips_format(tmp_path, patch, student_depth):
    import open_clip
    name = f"ViT-test-{patch}"
    (tmp_path / f"{name}.json").write_text(json.dumps(dict(
        embed_dim=16, quick_gelu=True,
        vision_cfg=dict(image_size=224, layers=3, width=128, patch_size=patch),
        text_cfg=dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1))))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    network = open_clip.create_model(name)
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    teacher = ma.load_teacher(name, str(tmp_path / "clip.pt"), levels=2)
    assert teacher.grid == (14, 14) and teacher.image_size == (14 * patch, 14 * patch)
    assert torch.equal(teacher.network.conv1.weight, network.visual.conv1.weight)
    student = ma.vit("vit_tiny_patch16_224", depth=student_depth)
    model, images = ma.MaskAlign(student, teacher), torch.rand(2, 3, 224, 224)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(images, *teacher(images), noise=torch.zeros(2, 196 + 2 * student_depth) + 0.5)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_student_file_loads_strictly_into_timm(teacher_file):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=4,
                                embed_dim=64, depth=4, num_heads=4).eval()
    network.load_state_dict(weights(teacher_file.parent))
    ours = ma.vit("vit_digits_patch4_32").eval()
    ma.load_encoder(ours, teacher_file)
    images = torch.rand(2, 3, 32, 32)
    expected = network.forward_features(ma.normalise(images, *ma.IMAGENET_MEAN_STD))
    assert torch.allclose(ours.norm(ours(images)[-1]), expected, atol=1e-5)


# --- Classification -----------------------------------------------------------------------------

@pytest.mark.parametrize("probe", [False, True])
def test_classifier_trains_all_or_the_head_alone(probe):
    model = train.Classifier(small(), 5, probe).train()
    model(torch.rand(4, 3, 12, 12)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert trained == {n for n, _ in model.named_parameters()
                       if n.startswith("align.1") or not probe and "student.norm" not in n}


@pytest.mark.parametrize("task", ["finetune", "probe"])
def test_classification_resumes_bit_for_bit(tmp_path, teacher_file, task):
    argv = ("--task", task, "--init", teacher_file, "--drop-path", 0.1, "--save-every", 4)
    train.main(list(map(str, digits(tmp_path / "whole", *argv))))
    real = train.learning_rate
    try:
        train.learning_rate = lambda step, *rest: real(step, *rest) if step < 7 else 1 / 0
        with pytest.raises(ZeroDivisionError):
            train.main(list(map(str, digits(tmp_path / "new", *argv))))
    finally:
        train.learning_rate = real
    assert torch.load(tmp_path / "new" / "last.pt")["step"] == 4
    train.main(list(map(str, digits(tmp_path / "new", *argv))))
    whole, new = (torch.load(tmp_path / out / "last.pt") for out in ("whole", "new"))
    for part in ("student", "align"):
        assert same(whole[part], new[part], 0)
    best = torch.load(tmp_path / "new" / "best.pt")
    top1 = [json.loads(line)["top1"] for line in (tmp_path / "new" / "log.jsonl").open()
            if "top1" in line]
    assert best.keys() == train.Classifier(ma.vit("vit_digits_patch4_32"), 10,
                                           task == "probe").state_dict().keys() and max(top1) > 0
    if task == "probe":
        assert same(new["student"], torch.load(teacher_file), 0)


def test_a_classifier_reads_the_mean_patch_token():
    model, images = train.Classifier(small(), 5, probe=False), torch.rand(2, 3, 12, 12)
    tokens = model.student(images)[-1]
    assert torch.allclose(model(images), model.align(tokens[:, 1:].mean(dim=1)), atol=1e-6)


# --- Folders and faults -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 12 + 4 noisy colours; the names are long, spaced and not ASCII."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("val", 4)):
        for label, colour in enumerate(((200, 20, 20), (20, 200, 20), (20, 20, 200))):
            for i in range(count):
                file = root / split / f"class {label} é" / f"{'long ' * 20}{i}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((60, 45), 90).convert("RGB").point(
                    [min(255, v // 3 + c) for c in colour for v in range(256)]).save(file)
    return root


def on_folder(root, out, *more):
    return ("--data", root, "--out", out, "--student", "vit_digits_patch4_32", "--teacher",
            "vit_digits_patch4_32", "--teacher-weights", "random", "--levels", 3,
            "--batch-size", 12, "--epochs", 4, "--warmup-epochs", 1, "--eval-every", 2,
            "--device", "cpu", *more)


def test_two_ranks_on_a_folder_equal_one_and_workers_change_nothing(tmp_path, folder):
    main(*on_folder(folder, tmp_path / "one", "--workers", 0))
    run(*on_folder(folder, tmp_path / "three", "--workers", 3))
    run(*on_folder(folder, tmp_path / "two", "--workers", 0), ranks=2)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "three"), 0)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"), 2e-4)
    logs = [[json.loads(line) for line in (tmp_path / out / "log.jsonl").open()]
            for out in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert all(one[key] == pytest.approx(two[key], rel=1e-3)
                   for key in ("step", "epoch", "loss", "lr", "grad_norm", "knn") if key in one)


def test_ranks_share_an_evaluation(monkeypatch):
    source, parts = train.Digits(7, (16, 16), 0, True), []
    arguments = (lambda images: images.float().mean((2, 3)), source, train.parse([]),
                 torch.device("cpu"))
    means, labels = train.outputs(*arguments)
    assert means.shape == (7, 3) and labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(train, "WORLD", 3)
    monkeypatch.setattr(train.dist, "all_gather_object",
                        lambda ranks, mine: parts.append(mine) or ranks.__setitem__(
                            slice(None), parts + [[]] * (3 - len(parts))))
    for rank in range(3):
        monkeypatch.setattr(train, "RANK", rank)
        shared, owners = train.outputs(*arguments)
    assert [sum(len(each) for _, each in part) for part in parts] == [3, 2, 2]
    assert owners.tolist() == [0, 3, 6, 1, 4, 2, 5] and torch.equal(shared, means[owners])


def test_names_that_only_look_like_digits_or_noise_are_folders(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(folder, "synthetic_photos")
    os.symlink(folder, "digits_photos")
    main(*on_folder("synthetic_photos", "noise", "--workers", 0, "--epochs", 1))
    main(*on_folder(folder, "photos", "--workers", 0, "--epochs", 1))
    assert same(weights(tmp_path / "noise"), weights(tmp_path / "photos"), 0)
    assert train.parse(["--data", "digits_photos"]).epochs == 200


def test_val_without_classes_is_not_trained_on(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / split / "a.png")
    data, bank, val = train.open_data(train.parse(["--data", str(tmp_path)]), (32, 32))
    assert [Path(name).parent.name for name in data.names] == ["train"] and val is None


@pytest.mark.parametrize("task", ["finetune", "probe"])
def test_only_fine_tuning_mixes_images_and_labels(tmp_path, folder, monkeypatch, task):
    real, labels = train.F.cross_entropy, []
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, target, **options: (
        labels.append(target) or real(logits, target, **options)))
    main(*on_folder(folder, tmp_path, "--task", task), "--workers", 0, "--epochs", 2)
    assert {target.ndim for target in labels} == {2 if task == "finetune" else 1}
    if task == "finetune":
        assert all(torch.allclose(target.sum(1), torch.ones(12)) for target in labels)
        assert any(0.01 < target.max(1).values.min() < 0.99 for target in labels)


def test_another_precision_does_not_resume(tmp_path, folder, capsys):
    main(*on_folder(folder, tmp_path, "--workers", 0, "--epochs", 1))
    assert f"lr {1.5e-4 * 12 / 256:.2e}; cpu off; evaluation\n" in capsys.readouterr().out
    main(*on_folder(folder, tmp_path, "--workers", 0, "--epochs", 1, "--amp", "off"))
    assert "evaluation; finished\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(*on_folder(folder, tmp_path, "--workers", 0, "--epochs", 1, "--amp", "bf16"))
    assert "amp off -> bf16" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "last.pt").write_bytes(b"old")

    def half(content, file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="last.pt could not be written"):
        train.write(tmp_path / "last.pt", {})
    assert (tmp_path / "last.pt").read_bytes() == b"old"


def test_unreadable_files_are_named_and_replaced(tmp_path, folder, capsys):
    shutil.copytree(folder, tmp_path / "data")
    for file in sorted((tmp_path / "data" / "train").rglob("*.JPEG"))[:3]:
        file.write_bytes(file.read_bytes()[:200])
    main(*on_folder(tmp_path / "data", tmp_path / "out", "--workers", 0))
    error = capsys.readouterr().err
    assert error.count("unreadable, ") == 1 and error.count(".JPEG': ") == 3
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])[
        "unreadable"] == 3


def test_a_few_unreadable_files_are_an_error_not_a_hang(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        train.main(list(map(str, on_folder(tmp_path, tmp_path / "out"))))
    assert "3 of 3 files are unreadable" in capsys.readouterr().err


BROKEN = ("text.jpg", "zero.png", "truncated.jpg", "gone.jpg", "bomb.png")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """One image of each kind that is met in the wild; the left half is red, the right half blue."""
    root = tmp_path_factory.mktemp("zoo")
    image = Image.new("RGB", (80, 40), (250, 10, 10))
    image.paste((10, 10, 250), (40, 0, 80, 40))
    image.save(root / "plain.jpg", quality=95)
    image.save(root / "png.JPEG", format="PNG")
    image.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    image.quantize(4).save(root / "palette.png")
    image.save(root / "animated.gif", save_all=True, append_images=[image.rotate(90)] * 2)
    turned = Image.Exif()
    turned[0x0112] = 6  # a viewer turns what is stored by 90° clockwise
    image.rotate(90, expand=True).save(root / "exif.jpg", quality=95, exif=turned)
    clear = image.convert("RGBA")
    clear.paste((0, 0, 0, 0), (40, 0, 80, 40))
    clear.save(root / "alpha.png")
    grey = [[60000] * 40 + [20000] * 40] * 40
    Image.fromarray(torch.tensor(grey, dtype=torch.uint16).numpy()).save(root / "grey16.png")
    (root / "text.jpg").write_text("no image")
    (root / "zero.png").touch()
    (root / "truncated.jpg").write_bytes((root / "plain.jpg").read_bytes()[:500])
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    (root / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks))
    (root / "x.jpg").mkdir()
    return root


@pytest.mark.parametrize("name, left, right", [
    *((name, (250, 10, 10), (10, 10, 250)) for name in (
        "plain.jpg", "png.JPEG", "cmyk.jpg", "palette.png", "animated.gif", "exif.jpg")),
    ("alpha.png", (250, 10, 10), (255, 255, 255)), ("grey16.png", [234] * 3, [78] * 3)])
def test_images_are_read_as_a_viewer_shows_them(zoo, name, left, right):
    images, _, bad = train.Folder([(zoo / name, "")], {}, (32, 32), 0).__getitems__([(0, 0)])
    assert not bad
    for column, colour in ((3, left), (28, right)):
        assert (images[0, :, 16, column] - torch.tensor(colour)).abs().max() <= 6


def test_unreadable_files_are_named_once_and_the_same_in_every_run(zoo, tmp_path, capsys):
    assert "x.jpg" not in {Path(file).name for file, _, _ in train.scan(zoo)}
    argv = (*on_folder(zoo, tmp_path / "0"), "--batch-size", 13, "--workers")
    main(*argv, 0)
    error = capsys.readouterr().err
    assert all(error.count(f"/{name}'") >= 1 for name in BROKEN)
    assert error.count("stand in") == 1 and logged(tmp_path / "0", "unreadable") == [5]
    run(*argv, 2, "--out", tmp_path / "2")
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"), 0)


def test_more_unreadable_files_than_one_percent_and_ten_stop_the_run(zoo, tmp_path, capsys):
    for i in range(22):
        shutil.copy(zoo / ("plain.jpg" if i % 2 else "text.jpg"), tmp_path / f"{i}.jpg")
    argv = (*on_folder(tmp_path, tmp_path / "out"), "--batch-size", 11, "--workers", 0)
    with pytest.raises(SystemExit):
        main(*argv)
    assert "11 of 22 files are unreadable" in capsys.readouterr().err
    (tmp_path / "0.jpg").unlink()
    (tmp_path / "2.jpg").unlink()
    main(*argv, "--out", tmp_path / "fewer", "--batch-size", 10)


def test_classes_are_the_folders_in_train(tmp_path):
    for file in ("train/b/1.png", "train/a/2.png", "train/a/deeper/3.png", "train/4.png",
                 "val/b/5.png", "val/6.png", "aside/c/7.png", "train/a/text.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    arguments = train.parse(["--data", str(tmp_path)])
    data, bank, val = train.open_data(arguments, (32, 32))
    assert [*data.classes] == ["a", "b"] and data.names == bank.names
    assert {Path(n).stem: label for n, label in zip(data.names, data.labels)} == {
        "1": 1, "2": 0, "3": 0}
    assert [Path(n).stem for n in val.names] == ["5"] and val.labels == [1]
    arguments.data = str(tmp_path / "train" / "a")  # no folder of classes: every image, no label
    data, _, val = train.open_data(arguments, (32, 32))
    assert not data.classes and val is None and len(data.names) == 2
    (tmp_path / "val" / "new").mkdir()
    (tmp_path / "val" / "new" / "8.png").touch()
    arguments.data = str(tmp_path)
    with pytest.raises(ValueError, match="val has classes that train lacks: .'new'"):
        train.open_data(arguments, (32, 32))


def test_fifty_thousand_files_are_scanned_in_seconds_and_by_one_rank(tmp_path, monkeypatch):
    for label in range(50):
        folder = tmp_path / "train" / f"{'long ' * 20}é {label}"
        folder.mkdir(parents=True)
        for i in range(1000):
            (folder / f"{i}.JPEG").touch()
    start = time.perf_counter()
    found = train.scan(str(tmp_path))
    assert time.perf_counter() - start < 5 and len(found) == 50000
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "scan", None)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "broadcast_object_list",
                        lambda box: box.__setitem__(0, found[:3]))
    arguments = train.parse(["--data", str(tmp_path)])
    assert [*train.open_data(arguments, (32, 32))[0].names] == [file for file, _, _ in found[:3]]


@pytest.mark.parametrize("width, height, decoded", [
    (1000, 1000, 4), (1000, 600, 2), (250, 190, 1), (60, 40, 1)])  # the last is enlarged
def test_crops_are_torchvisions_and_large_jpegs_are_not_decoded_whole(
        tmp_path, monkeypatch, width, height, decoded):
    """Pillow's RandomResizedCrop and flip of the whole image, on the same boxes."""
    down, right = torch.linspace(0, 6, height), torch.linspace(0, 6, width)
    waves = torch.stack([(down * k).sin()[:, None] + (right * k).cos() for k in (1, 2, 3)], dim=2)
    Image.fromarray(((waves + 2) / 4 * 255).byte().numpy()).save(tmp_path / "a.jpg", quality=95)
    source = train.Folder([(tmp_path / "a.jpg", "")], {}, (56, 56), 0, "pretrain")
    crop = v2.RandomResizedCrop(56, (0.2, 1.0), interpolation=Image.BICUBIC)
    sizes, real = [], train.as_seen
    monkeypatch.setattr(train, "as_seen", lambda image: sizes.append(image.size) or real(image))
    for epoch in range(8):
        ours = source.__getitems__([(epoch, 0)])[0][0]
        torch.default_generator.manual_seed(train.seed_of(0, epoch, 0))
        at = crop.make_params([Image.new("RGB", sizes[-1])])
        assert sizes[-1] == (width / decoded, height / decoded)
        box = [decoded * x for x in (at["left"], at["top"], at["left"] + at["width"],
                                     at["top"] + at["height"])]
        with Image.open(tmp_path / "a.jpg") as image:
            theirs = image.crop(box).resize((56, 56), Image.BICUBIC)
        theirs = v2.functional.pil_to_tensor(v2.RandomHorizontalFlip()(theirs))
        assert (ours.float() - theirs.float()).abs().mean() < (1 if decoded > 1 else 0.1)


def test_one_rank_of_two_meets_a_loss_that_is_not_finite(tmp_path, folder):
    """Rank 1 sees 6 of the 12 images of step 3; neither rank takes that step."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import math, os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, train
real, steps = train.MaskAlign.forward, []
def forward(self, *args, **options):
    steps.append([p.detach().clone() for p in self.parameters()])
    if len(steps) == 4:
        assert all(map(torch.equal, steps[2], steps[3])), "a step was taken"
    bad = os.environ["RANK"] == "1" and len(steps) == 3
    return real(self, *args, **options) + (math.inf if bad else 0)
train.MaskAlign.forward = forward
train.main()
""")
    error = run(*on_folder(folder, tmp_path / "out"), "--workers", 0, ranks=2, code=2,
                script=script).stderr
    lines = [line for line in error.splitlines() if "non-finite" in line]
    assert "a step was taken" not in error
    assert lines and all("in step 3, rank 1, lr" in line for line in lines)
    assert all(line.count(".JPEG") == 6 for line in lines) and saved(tmp_path / "out") == 0


def test_speed_is_told_apart_from_waiting(tmp_path, folder, monkeypatch):
    real = train.loader

    def slow(*arguments):
        for batch in real(*arguments):
            time.sleep(0.1)
            yield batch
    monkeypatch.setattr(train, "loader", slow)
    main(*on_folder(folder, tmp_path), "--workers", 0, "--micro-batch", 6, "--eval-every", 100)
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    # a step of 12 images sleeps 2 x 0.1 s, however fast the rest of it is on this machine
    assert record["step"] == 10 and record["images_per_s"] < 60 and record["data_wait"] < 1
    assert 0.2 <= record["data_wait"] * 12 / record["images_per_s"] < 0.3
    monkeypatch.setattr(train, "loader", real)
    monkeypatch.setattr(torch.utils.data, "DataLoader", None)  # nobody asks for it
    main(*on_folder("synthetic:120", tmp_path / "resident"))
    assert max(logged(tmp_path / "resident", "data_wait")) < 0.01


def test_graphs_are_whole_and_compiled_once(tmp_path, folder):
    model = ma.MaskAlign(small(), teacher := teacher_of(small(dim=12)), mask_ratio=0.5)
    images, noise = torch.rand(2, 3, 12, 12), torch.rand(2, 15)
    seen = teacher(images)
    assert torch._dynamo.explain(teacher)(images).graph_break_count == 0
    assert torch._dynamo.explain(model)(images, *seen, noise=noise).graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)(images)
    assert all(map(torch.equal, seen[0], compiled[0])) and torch.equal(seen[1], compiled[1])
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch, train
real = torch.compile
torch.compile = lambda part: real(part, backend="eager", fullgraph=True)
torch._dynamo.config.error_on_recompile = True  # with evaluation in between
train.main()
""")
    run(*on_folder(folder, tmp_path / "out"), "--workers", 0, "--compile", script=script)
    assert saved(tmp_path / "out") == 12


def test_evaluation_has_the_precision_of_training(tmp_path, folder, monkeypatch):
    seen, real = set(), ma.ViT.forward

    def forward(self, *arguments, **options):
        levels = real(self, *arguments, **options)
        if self.cls_token.requires_grad:  # the student
            seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return levels
    monkeypatch.setattr(ma.ViT, "forward", forward)
    for task in ("pretrain", "finetune"):
        seen.clear()
        main(*on_folder(folder, tmp_path / task, "--task", task), "--workers", 0, "--amp", "bf16",
             "--epochs", 1)
        assert seen == {(True, True), (False, True)}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_for_the_gpu_only_where_it_logs(tmp_path, folder, monkeypatch, amp):
    rate, modes = train.learning_rate, []

    def watch(step, *rest):  # of 27 steps, 20 after those that compile
        modes.append("error" if 4 <= step < 24 else "default")
        torch.cuda.set_sync_debug_mode(modes[-1])
        return rate(step, *rest)
    monkeypatch.setattr(train, "learning_rate", watch)
    monkeypatch.setattr(train, "LOG_EVERY", 100)
    try:
        main(*on_folder(folder, tmp_path), "--device", "cuda", "--amp", amp, "--epochs", 9,
             "--micro-batch", 6, "--eval-every", 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes.count("error") >= 20 and saved(tmp_path) == 27


def test_without_a_compiler_nothing_is_compiled_and_that_is_said(tmp_path, folder):
    environment = dict(os.environ, CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "x"))
    done = run(*on_folder(folder, tmp_path / "out"), "--workers", 0, "--compile", env=environment)
    assert done.stdout.count("no compiler works here") == 1
    assert saved(tmp_path / "out") == 12


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("most", [3, 0])
def test_out_of_memory_names_what_would_fit(tmp_path, folder, monkeypatch, capsys, task, most):
    real, held = ma.ViT.forward, []

    def full(self, images, *rest, **options):
        if self.cls_token.requires_grad and len(images) > most:
            held.append(weakref.ref(images))
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        assert all(image() is None for image in held)  # what failed has let go of its memory
        return real(self, images, *rest, **options)
    monkeypatch.setattr(ma.ViT, "forward", full)
    with pytest.raises(SystemExit) as error:
        main(*on_folder(folder, tmp_path, "--task", task), "--workers", 0, "--micro-batch", 12)
    assert error.value.code == 2 and saved(tmp_path) == 0
    assert capsys.readouterr().err.endswith(
        f"train.py: error: lower --micro-batch (12 exceeds memory, {most} fits)\n")


def test_two_ranks_name_what_would_fit_after_a_backward_pass_without_memory(tmp_path, folder):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch, train
class Full(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()
    @staticmethod
    def backward(context, gradient):
        if len(gradient) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return gradient
real = train.MaskAlign.forward
def forward(self, images, *rest, **options):
    self.student.blocks[1].register_forward_hook(lambda block, inputs, x: Full.apply(x))
    return real(self, images, *rest, **options)
train.MaskAlign.forward = forward
train.main()
""")
    error = run(*on_folder(folder, tmp_path / "out"), "--workers", 0, ranks=2, code=2,
                script=script).stderr
    assert "train.py: error: lower --micro-batch (6 exceeds memory, 1 fits)" in error
    assert "RuntimeError" not in error


def long(folder, out, *more):
    return on_folder(folder, out, "--epochs", 40, "--save-every", 10, "--workers", 0,
                     "--eval-every", 20, *more)


def saved(out):
    """The step of last.pt, or -1."""
    return torch.load(out / "last.pt")["step"] if (out / "last.pt").exists() else -1


def reach(process, out, step):
    while saved(out) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def logged(out, key="step"):
    return [json.loads(line)[key] for line in (out / "log.jsonl").open()]


@pytest.mark.parametrize("task", ["pretrain", "finetune", "probe"])
def test_kills_lose_nothing(tmp_path, folder, task):
    argv = long(folder, tmp_path / "whole", "--task", task, "--save-every", 2, "--epochs", 20)
    main(*argv)
    argv = (*argv, "--out", tmp_path / "killed")
    process = start(*argv)
    reach(process, tmp_path / "killed", 4)
    time.sleep(random.random() / 2)
    process.kill()
    process.communicate()
    with open(tmp_path / "killed" / "log.jsonl", "a") as file:  # as killed before the checkpoint
        file.write('{"step": 175, "loss": 0}\n{"step": 18')
    assert saved(tmp_path / "killed") < 60
    main(*argv)
    whole, killed = (torch.load(tmp_path / out / "last.pt") for out in ("whole", "killed"))
    for part in ("student", "align"):
        assert same(whole[part], killed[part], 0)
    assert logged(tmp_path / "killed") == list(range(2, 61, 2))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, folder):
    """What two processes end with that nothing disturbs."""
    out = tmp_path_factory.mktemp("two")
    run(*long(folder, out), ranks=2)
    return out


def test_a_killed_torchrun_and_a_killed_rank_lose_nothing(tmp_path, folder, two_ranks):
    process = start(*long(folder, tmp_path), ranks=2)
    reach(process, tmp_path, 10)
    ranks = children(process.pid)
    process.kill()
    process.communicate()
    time.sleep(0.5)  # and no orphan goes on
    assert not any(Path(f"/proc/{rank}/exe").exists() for rank in ranks)
    process = start(*long(folder, tmp_path), ranks=2, options=("--max-restarts", "1"))
    reach(process, tmp_path, saved(tmp_path) + 20)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert same(weights(two_ranks), weights(tmp_path), 0)
    assert logged(tmp_path) == list(range(10, 121, 10))


def test_sigterm_and_other_numbers_of_processes(tmp_path, folder, two_ranks):
    process = start(*long(folder, tmp_path / "1"), ranks=2)
    reach(process, tmp_path / "1", 20)
    process.terminate()
    process.communicate()
    assert process.returncode and 20 <= saved(tmp_path / "1") < 120
    assert logged(tmp_path / "1")[-1] - saved(tmp_path / "1") in (0, 10)
    shutil.copytree(tmp_path / "1", tmp_path / "4")
    main(*long(folder, tmp_path / "1"))
    run(*long(folder, tmp_path / "4"), ranks=4)
    for out in (tmp_path / "1", tmp_path / "4"):
        assert same(weights(two_ranks), weights(out), 2e-4)
        assert logged(out, "loss") == pytest.approx(logged(two_ranks, "loss"), rel=1e-4)


def test_a_killed_loader_worker_ends_the_run_and_it_resumes(tmp_path, folder):
    argv = (*long(folder, tmp_path / "out"), "--workers", 1)
    process = start(*argv)
    reach(process, tmp_path / "out", 10)
    workers = [worker for child in children(process.pid) for worker in children(child)]
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    error = process.communicate()[1].strip().splitlines()[-1]
    assert "DataLoader worker" in error or "worker died" in error
    assert workers and process.returncode
    main(*argv, "--workers", 0)
    main(*long(folder, tmp_path / "whole"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of file sizes")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, folder):
    import resource
    argv = long(folder, tmp_path)
    main(*argv, "--epochs", 0.1)
    good = (tmp_path / "last.pt").read_bytes()
    full = len(good) - 1000
    state = torch.load(tmp_path / "last.pt")
    state["step"], state["arguments"]["epochs"] = 0, 40.0
    torch.save(state, tmp_path / "last.pt")
    good = (tmp_path / "last.pt").read_bytes()
    error = run(*argv, code=2, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (full, full))).stderr.strip().splitlines()[-1]
    assert f"{tmp_path}/last.pt could not be written" in error
    assert (tmp_path / "last.pt").read_bytes() == good


def test_an_out_that_cannot_be_written_or_goes_away(tmp_path, folder, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(*long(folder, tmp_path / "file" / "out"))
    assert f"{tmp_path}/file" in capsys.readouterr().err
    real = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, *rest: shutil.rmtree(
        tmp_path / "out", ignore_errors=True) if step == 7 else real(step, *rest))
    monkeypatch.setattr(train, "learning_rate", lambda step, *rest, old=train.learning_rate: (
        old(step, *rest), real(step, *rest))[1])
    with pytest.raises(SystemExit):
        main(*long(folder, tmp_path / "out"))
    assert f"{tmp_path}/out/student.pt could not be written" in capsys.readouterr().err


def test_damaged_checkpoints_and_full_disks_are_one_line(tmp_path, folder, monkeypatch, capsys):
    argv = list(map(str, on_folder(folder, tmp_path / "out", "--workers", 0)))
    train.main(argv)
    last = tmp_path / "out" / "last.pt"
    good = last.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]
    for damaged in (good[:5000], flipped):
        last.write_bytes(damaged)
        with pytest.raises(SystemExit):
            train.main(argv)
    last.unlink()
    with pytest.raises(SystemExit):
        train.main(argv)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space")))
    last.write_bytes(good)
    with pytest.raises(SystemExit):
        train.main([*argv, "--out", str(tmp_path / "full")])
    assert not (tmp_path / "full" / "last.pt").exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if "train.py: error" in line]
    assert len(errors) == 4 and all("last.pt was not read" in line for line in errors[:2])
    assert "no last.pt" in errors[2] and "could not be written" in errors[3]


def test_no_step_is_taken_with_a_loss_that_is_not_finite(tmp_path, folder, monkeypatch, capsys):
    argv = list(map(str, on_folder(folder, tmp_path / "out", "--workers", 0, "--save-every", 4)))
    real, calls, before = ma.MaskAlign.forward, [], {}

    def forward(self, *args, **options):
        calls.append(1)
        if len(calls) == 6:
            before.update({k: v.clone() for k, v in self.state_dict().items()})
        loss = real(self, *args, **options)
        after = self.state_dict()
        assert len(calls) != 7 or all(torch.equal(before[k], after[k]) for k in before)
        # the gradient of this is finite, and yet no step may be taken with it
        return loss + math.inf if len(calls) == 6 else loss
    monkeypatch.setattr(train.MaskAlign, "forward", forward)
    with pytest.raises(SystemExit):
        train.main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "in step 6, rank 0, lr" in error and "last.pt is of before" in error
    assert error.count(".JPEG") == 12
    assert len(calls) == 8 and torch.load(tmp_path / "out" / "last.pt")["step"] == 4


def test_fp16_skips_a_step_and_the_log_stays_json(tmp_path, folder, monkeypatch):
    """Step 4, a logged one, has an infinite gradient, as any may while fp16's scale adapts."""
    argv = on_folder(folder, tmp_path / "out", "--workers", 0, "--save-every", 4, "--amp", "fp16")
    real, weights_at = ma.MaskAlign.forward, []

    def forward(self, *args, **options):
        if not weights_at:
            self.align.matrix.register_hook(
                lambda grad: grad + math.inf if len(weights_at) == 4 else grad)
        weights_at.append(self.align.matrix.detach().clone())
        return real(self, *args, **options)
    monkeypatch.setattr(train.MaskAlign, "forward", forward)
    main(*argv)
    same_as_before = [torch.equal(a, b) for a, b in zip(weights_at, weights_at[1:])]
    assert same_as_before == [step == 4 for step in range(1, 12)]
    with open(tmp_path / "out" / "log.jsonl") as log:
        steps = [json.loads(line, parse_constant=pytest.fail)["step"] for line in log]
    assert steps == [4, 8, 10, 12]


# --- The recipe, in the loop --------------------------------------------------------------------

def test_recipes_are_the_papers():
    keys = ("epochs batch_size blr min_lr warmup_epochs weight_decay drop_path layer_decay "
            "eval_every").split()
    for task, data, numbers in (
            ("pretrain", "x", (200, 1024, 1.5e-4, 1e-5, 20, 0.05, 0.1, 1, 20)),
            ("finetune", "x", (100, 1024, 3e-4, 1e-6, 5, 0.05, 0.2, 0.55, 1)),
            ("probe", "x", (90, 16384, 0.025, 0, 10, 0, 0, 1, 1)),
            ("finetune", "digits", (1, 64, 8e-3, 1e-6, 0.1, 0.05, 0, 1, 1))):
        args = vars(train.parse(["--task", task, "--data", data]))
        assert tuple(args[key] for key in keys) == numbers
    assert train.parse(["--data", "x"]).__dict__.items() >= dict(
        student="vit_base_patch16_224", teacher="ViT-B-16-quickgelu", teacher_weights="openai",
        levels=5, mask="attentive", mask_ratio=0.7, seed=0, task="pretrain").items()
    assert train.KNN == dict(k=20, temperature=0.07)


def test_what_may_be_zero_and_what_must_divide(monkeypatch):
    zero = set()
    for key in [key for key, v in vars(train.parse([])).items() if type(v) in (int, float)]:
        try:
            train.parse([f"--{key.replace('_', '-')}", "0"])
            zero.add(key)
        except ValueError as error:
            assert "out of range" in str(error)
    assert zero == {"min_lr", "warmup_epochs", "weight_decay", "drop_path", "mask_ratio",
                    "workers", "seed"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.parse(["--device", "cuda:1"]).device == "cuda:1"
    monkeypatch.setattr(train, "WORLD", 5)
    with pytest.raises(ValueError, match="64 is not divisible by 5"):
        train.parse([])


def test_flags_reach_the_model(tmp_path):
    args = train.parse(["--data", "digits", "--teacher-weights", "random", "--drop-path", "0.3",
                        "--mask", "random", "--mask-ratio", "0.4", "--levels", "2"])
    model, teacher, _ = train.build(args, torch.device("cpu"), torch.float32)
    assert model.student.drop_rates[-1] == pytest.approx(0.3) and teacher.levels == 2
    assert (model.mask, model.mask_ratio) == ("random", 0.4)


@pytest.mark.parametrize("task", ["pretrain", "finetune", "probe"])
def test_the_optimiser_gets_the_recipe(tmp_path, folder, monkeypatch, task):
    real, seen = torch.amp.GradScaler.step, []
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda self, optimiser: (seen.append(
        [dict(group) for group in optimiser.param_groups]), real(self, optimiser))[1])
    main(*on_folder(folder, tmp_path, "--task", task), "--workers", 0, "--blr", 0.001, "--min-lr",
         1e-5, "--layer-decay", 0.5, "--weight-decay", 0.3, "--eval-every", 100)
    rates = [train.learning_rate(step, 12, 3, 0.001 * 12 / 256, 1e-5) for step in range(12)]
    for rate, groups in zip(rates, seen, strict=True):
        assert all(g["lr"] == pytest.approx(rate * g["scale"]) for g in groups)
    assert {g["weight_decay"] for g in seen[0]} == {0, 0.3}
    assert {g["scale"] for g in seen[0]} == {1} if task == "probe" else {0.5 ** i for i in range(6)}
    assert {g.get("momentum", g.get("betas")) for g in seen[0]} == {
        dict(pretrain=(0.9, 0.95), finetune=(0.9, 0.999), probe=0.9)[task]}
    assert logged(tmp_path, "lr") == pytest.approx([rates[9], rates[11]])
    assert logged(tmp_path, "epoch") == pytest.approx([10 / 3, 4])


def test_augmentations_by_task(tmp_path):
    Image.effect_noise((300, 500), 90).convert("RGB").save(tmp_path / "a.png")
    source = lambda task: train.Folder([(tmp_path / "a.png", "a")], {"a": 0, "b": 1}, (224, 224),
                                       0, task)
    for task, area in (("pretrain", 0.2), ("finetune", 0.08), ("probe", 0.08)):
        _, crop, flip, *more = source(task).augment.transforms
        assert crop.scale == (area, 1) and flip.p == 0.5 and len(more) == 2 * (task == "finetune")
        assert bool(source(task).mix) == bool(more)
    auto, erase = source("finetune").augment.transforms[3:]
    assert (auto.num_ops, auto.magnitude, erase.p) == (2, 9, 0.25)
    assert [(type(mix), mix.alpha) for mix in source("finetune").mix.transforms] == [
        (v2.MixUp, 0.8), (v2.CutMix, 1)]
    whole = v2.functional.pil_to_tensor(Image.open(tmp_path / "a.png"))  # evaluation's centre
    centre = v2.functional.center_crop(v2.functional.resize(
        whole, 256, v2.InterpolationMode.BICUBIC), [224, 224])
    assert torch.equal(source(None).__getitems__([(0, 0)])[0][0], centre)


def test_bank_and_val_are_not_augmented_and_a_share_may_be_unreadable(folder):
    data, bank, val = train.open_data(train.parse(["--data", str(folder)]), (32, 32))
    pixels = lambda source, epoch: source.__getitems__([(epoch, 0)])[0]
    assert all(torch.equal(pixels(s, 0), pixels(s, 1)) for s in (bank, val))
    assert not torch.equal(pixels(data, 0), pixels(data, 1))
    for count, limit in ((3, 2), (500, 10), (5000, 50)):
        assert train.Folder([("a", "")] * count, {}, (8, 8), 0).limit == limit


def test_every_epoch_has_its_order_and_every_step_its_noise(tmp_path, folder, monkeypatch):
    real, forward, keys, noises = train.Folder.__getitems__, ma.MaskAlign.forward, [], []
    monkeypatch.setattr(train.Folder, "__getitems__", lambda self, asked: (
        keys.extend(asked if self.seed else []), real(self, asked))[1])  # k-NN's have seed 0
    monkeypatch.setattr(train.MaskAlign, "forward", lambda *args, noise: (
        noises.append(noise[0, 0].item()), forward(*args, noise=noise))[1])
    for seed in (1, 2):
        main(*on_folder(folder, tmp_path / str(seed), "--seed", seed, "--workers", 0))
    epochs = [[i for epoch, i in part if epoch == e] for part in (keys[:144], keys[144:])
              for e in range(4)]
    assert all(sorted(epoch) == list(range(36)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(36))}) == 9
    assert len(set(noises)) == 24


def test_mixing_differs_by_step_and_labels_are_smoothed(tmp_path, folder, monkeypatch):
    real, calls = train.F.cross_entropy, []
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, target, **options: (
        calls.append((target, options)), real(logits, target, **options))[1])
    for task, smoothing in (("finetune", 0.1), ("probe", 0)):
        calls.clear()
        main(*on_folder(folder, tmp_path / task, "--task", task), "--workers", 0)
        assert all(options["label_smoothing"] == smoothing for _, options in calls)
        if task == "finetune":
            assert len({round(target.max(1).values.min().item(), 4) for target, _ in calls}) > 4


def test_the_gradient_is_that_of_the_batch_at_any_micro_batch_and_precision(tmp_path, folder):
    for name, more in (("1", ()), ("2", ("--micro-batch", 4)), ("3", ("--amp", "fp16"))):
        main(*on_folder(folder, tmp_path / name, "--workers", 0, "--epochs", 0.4, *more))
    one, micro, half = (logged(tmp_path / name, "grad_norm")[0] for name in "123")
    assert micro == pytest.approx(one, rel=1e-3) and half == pytest.approx(one, rel=0.02)


def test_the_log_has_the_mean_loss_and_the_median_norm(tmp_path, folder, monkeypatch):
    real, losses, norms = ma.MaskAlign.forward, [], iter([9., 1., 2., 100., 3.] * 3)
    monkeypatch.setattr(train, "LOG_EVERY", 5)
    monkeypatch.setattr(train.nn.utils, "get_total_norm", lambda grads: torch.tensor(next(norms)))

    def forward(self, *args, **options):
        loss = real(self, *args, **options)
        losses.append(loss.item())
        return loss
    monkeypatch.setattr(train.MaskAlign, "forward", forward)
    main(*on_folder(folder, tmp_path), "--workers", 0, "--eval-every", 100)
    assert logged(tmp_path, "grad_norm") == [3, 3, 1]
    assert logged(tmp_path, "loss") == pytest.approx(
        [sum(losses[at]) / len(losses[at])
         for at in (slice(0, 5), slice(5, 10), slice(10, 12))], rel=1e-5)


@pytest.mark.parametrize("every, at", [(1, [6, 12]), (4, [8, 12])])
def test_evaluation_comes_every_so_many_epochs(tmp_path, folder, monkeypatch, every, at):
    real, modes = ma.MaskAlign.forward, []
    monkeypatch.setattr(train, "LOG_EVERY", every)
    monkeypatch.setattr(train, "knn", lambda *rest: 1.0)
    monkeypatch.setattr(train.MaskAlign, "forward", lambda self, *args, **options: (
        modes.append(self.student.training), real(self, *args, **options))[1])
    main(*on_folder(folder, tmp_path), "--workers", 0)  # every 2 epochs of 3 steps
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [record["step"] for record in records if "knn" in record] == at
    assert modes == [True] * 12


def test_best_is_written_when_top1_is_higher_than_ever(tmp_path, folder, monkeypatch):
    real, top1, written = train.write, [30., 20., 30., 10.], []
    monkeypatch.setattr(train, "LOG_EVERY", 3)
    monkeypatch.setattr(train, "accuracy", lambda *rest, topk: [top1.pop(), 99.])
    monkeypatch.setattr(train, "write", lambda path, content: (
        written.append((path.name, len(top1))), real(path, content)))
    main(*on_folder(folder, tmp_path, "--task", "probe"), "--workers", 0, "--eval-every", 1)
    assert [left for name, left in written if name == "best.pt"] == [3, 2]
    assert logged(tmp_path, "top1") == [10, 30, 20, 30] and logged(tmp_path, "top5") == [99] * 4


def test_what_may_change_when_a_run_resumes(tmp_path, folder, capsys):
    shutil.copytree(folder, tmp_path / "data")
    argv = on_folder(tmp_path / "data", tmp_path / "out", "--workers", 0, "--epochs", 0.4)
    main(*argv)
    main(*argv, "--micro-batch", 5, "--save-every", 7, "--eval-every", 9, "--no-compile")
    assert "finished\n" in capsys.readouterr().out
    for flag, value in dict(task="probe", student="vit_tiny_patch16_224", seed=1, teacher="x",
                            teacher_weights="x", levels=2, mask="random", mask_ratio=0.6, epochs=9,
                            batch_size=6, blr=1, min_lr=1, warmup_epochs=0, weight_decay=0,
                            drop_path=0, layer_decay=0.5, init="x").items():
        args = train.parse(list(map(str, (*argv, f"--{flag.replace('_', '-')}", value))))
        now = {k: v for k, v in vars(args).items() if k not in train.FREE}
        with pytest.raises(ValueError, match=f"'{flag} "):
            train.resume(tmp_path / "out", {}, now)
    next((tmp_path / "data" / "train").rglob("*.JPEG")).unlink()
    with pytest.raises(SystemExit):
        main(*argv)
    assert "images 36 -> 35" in capsys.readouterr().err


# --- The house ----------------------------------------------------------------------------------

def test_readme_points_at_the_right_lines():
    lines = (HERE / "maskalign.py").read_text().splitlines()
    rows = re.findall(r"\| `([\w.]+)` \| (\d+) \|", (HERE / "README.md").read_text())
    assert len(rows) >= 8
    for name, number in rows:
        assert re.search(rf"(class|def) {name.split('.')[-1]}\b", lines[int(number) - 1]), name


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(HERE / "tutorial.ipynb", 4)


def test_tutorial_runs(notebook, tmp_path, monkeypatch):
    """In a short version, by a real kernel, in a directory that holds nothing else."""
    for name in ("maskalign.py", "train.py"):
        shutil.copy(HERE / name, tmp_path)
    monkeypatch.setenv("LENGTH", "0.02")
    client = nbclient.NotebookClient(copy.deepcopy(notebook), timeout=300, kernel_name="python3",
                                     resources=dict(metadata=dict(path=str(tmp_path))))
    client.execute()  # raises at the first error
    pictures = [output for cell in client.nb.cells for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 10
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["maskalign.py", "train.py"]


def test_tutorial_is_committed_as_one_run(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(len(cell.source.splitlines()) <= 20 for cell in cells)
    assert len(json.dumps([cell.outputs for cell in cells])) < 2e6
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


def test_line_budget():
    lines = [(HERE / name).read_text().splitlines() for name in ("maskalign.py", "train.py")]
    assert max(len(line) for line in sum(lines, [])) <= 100
    claimed = re.search(r"(\d+) lines together", (HERE / "README.md").read_text())
    assert sum(map(len, lines)) == int(claimed[1]) <= 720
