"""Properties of maskalign.py and train.py; sizes are drawn pairwise distinct."""
import json
import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
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


def run(*argv, ranks=1, code=0):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port",
              "29517"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launch, str(HERE / "train.py"), *map(str, argv)],
                          capture_output=True, text=True)
    assert done.returncode == code or ranks > 1 and code and done.returncode, done.stderr
    return done


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


def test_world_size_accumulation_and_resume_agree(tmp_path, teacher_file):
    base = ("--teacher-weights", teacher_file, "--drop-path", 0.2)
    run(*digits(tmp_path / "one", *base))
    run(*digits(tmp_path / "micro", *base, "--micro-batch", 6, "--workers", 1))
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
    run(*digits(tmp_path / "cut", *base, "--save-every", 5))
    assert same(one, weights(tmp_path / "cut"), 0)
    assert "finished" in run(*digits(tmp_path / "cut", *base)).stdout
    assert "seed 0 -> 1" in run(*digits(tmp_path / "cut", *base, "--seed", 1), code=2).stderr


@pytest.mark.parametrize("argv, says", [
    (("--data", "/nowhere"), "no such folder"),
    (("--teacher", "nope"), "unknown teacher"),
    (("--student", "nope"), "unknown ViT"),
    (("--mask-ratio", "0.999"), "no visible patch"),
    (("--levels", "9"), "levels"),
    (("--teacher", "ViT-B-16", "--teacher-weights", "openai"), "ViT-B-16-quickgelu"),
    (("--teacher", "RN50", "--teacher-weights", "random"), "CLS"),
    (("--student", "vit_tiny_patch16_224"), "grids differ"),
    (("--layer-decay", "1.5"), "--layer-decay"),
    (("--batch-size", "0"), "--batch-size"),
])
def test_bad_input_is_one_line(tmp_path, capsys, teacher_file, argv, says):
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, digits(tmp_path / "out", "--teacher-weights", teacher_file)), *argv])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and says in error[0]


def test_line_budget():
    lines = [(HERE / name).read_text().splitlines() for name in ("maskalign.py", "train.py")]
    assert max(len(line) for line in sum(lines, [])) <= 100
    claimed = re.search(r"(\d+) lines together", (HERE / "README.md").read_text())
    assert sum(map(len, lines)) == int(claimed[1]) <= 720
