"""Train and evaluate with MaskAlign (maskalign.py).

    python train.py                                                  # demo: digits, no download
    torchrun --nproc_per_node=8 train.py --data /imagenet            # the paper's pre-training
    python train.py --task finetune --init out/student.pt --data /imagenet        # or --task probe

--data is a folder with train/ and val/ of one folder per class, any folder of images, "digits"
(built in, made on the fly; "digits:N" for N fixed ones) or "synthetic" (noise that lies on the
device, to time a step). A run that finds its --out/last.pt goes on from there.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import maskalign
from maskalign import MaskAlign, load_encoder, load_strict, load_teacher, read_weights, vit

LOG_EVERY = 10  # optimiser steps; the only times the host waits for the GPU
KNN = dict(k=20, temperature=0.07)
FREE = "out data workers device compile micro_batch save_every eval_every".split()  # on resuming
COMMON = dict(data="digits", out="out", student="vit_base_patch16_224", init=None, seed=0,
              micro_batch=256, save_every=1000, workers=None, amp=None, compile=None, device=None)
PRETRAIN = dict(teacher="ViT-B-16-quickgelu", teacher_weights=None, levels=5, mask="attentive",
                mask_ratio=0.7, layer_decay=1.0)
RECIPES = {  # each default stands here, once: paper.md's recipes for ViT-B, then the digits'
    "pretrain": {**COMMON, **PRETRAIN, **dict(
        epochs=200.0, batch_size=1024, blr=1.5e-4, min_lr=1e-5, warmup_epochs=20.0,
        weight_decay=0.05, drop_path=0.1, eval_every=20)},
    "finetune": {**COMMON, **dict(
        epochs=100.0, batch_size=1024, blr=3e-4, min_lr=1e-6, warmup_epochs=5.0,
        weight_decay=0.05, drop_path=0.2, layer_decay=0.55, eval_every=1)},
    "probe": {**COMMON, **dict(
        epochs=90.0, batch_size=4096, blr=0.1, min_lr=0.0, warmup_epochs=10.0,
        weight_decay=0.0, drop_path=0.0, layer_decay=1.0, eval_every=1)},
}
DIGITS = {"student": "vit_digits_patch4_32", "teacher": "vit_digits_patch4_32", "levels": 3,
          "batch_size": 64, "epochs": 1.0, "warmup_epochs": 0.1, "drop_path": 0.0, "eval_every": 1,
          "layer_decay": 1.0}
DIGITS_LR = {"pretrain": 8e-3, "finetune": 8e-3, "probe": 0.4}


# --- Data: images depend on (seed, epoch, index) alone ------------------------------------------

def seed_of(*key):
    """Any key -> a 63-bit seed."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


class Digits:
    """Ten classes of rendered digits. Keys (epoch, index) -> images uint8 [b,3,32,32], labels [b],
    a dict of unreadable files. With `fixed`, all epochs hold the same images."""
    classes, size = list("0123456789"), 32

    def __init__(self, count, seed, fixed):
        self.count, self.seed, self.fixed = count, seed, fixed
        font = ImageFont.load_default(28)
        glyphs = [Image.new("L", (self.size, self.size)) for _ in self.classes]
        for digit, glyph in zip(self.classes, glyphs):
            ImageDraw.Draw(glyph).text((16, 16), digit, fill=255, font=font, anchor="mm")
        self.glyphs = torch.stack([v2.functional.pil_to_tensor(glyph) / 255 for glyph in glyphs])

    def __len__(self):
        return self.count

    def name(self, index):
        return f"digit {index}"

    def __getitems__(self, keys):
        labels = torch.tensor([index % 10 for _, index in keys])
        u = torch.stack([torch.rand(60, generator=torch.Generator().manual_seed(seed_of(
            self.seed, 0 if self.fixed else epoch, index))) for epoch, index in keys])
        angle, scale = (u[:, 0] - 0.5) * 1.0, 0.8 + 0.8 * u[:, 1]
        cos, sin = angle.cos() * scale, angle.sin() * scale
        shift = (u[:, 2:4] - 0.5) * 0.6 * scale[:, None]
        theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1)
        grid = F.affine_grid(rearrange(theta, "b (i j) -> b i j", i=2),
                             (len(keys), 1, self.size, self.size), align_corners=False)
        alpha = F.grid_sample(self.glyphs[labels], grid, align_corners=False)
        ink = rearrange(0.8 + 0.2 * u[:, 4:7], "b c -> b c 1 1")
        ground = rearrange(0.15 * u[:, 12:60], "b (c h w) -> b c h w", c=3, h=4)
        ground = F.interpolate(ground, self.size, mode="bilinear", align_corners=False)
        return ((ground + alpha * (ink - ground)) * 255).round().byte(), labels, {}


class Folder:
    """Images below a folder. Keys (epoch, index) -> images uint8 [b,3,H,W], labels [b], a dict
    {name: reason} of files that could not be read and were replaced by their successors.

    augment: None (resize and centre crop), "crop" (random resized crop and flip) or "full" (that,
    RandAugment and random erasing).
    """

    def __init__(self, files, labels, classes, size, seed, scale=(0.08, 1.0), augment=None):
        self.files, self.labels, self.classes = files, labels, classes
        self.size, self.seed, self.scale, self.augment = size, seed, scale, augment
        self.finish = v2.Compose([v2.RandAugment(2, 9), v2.RandomErasing(0.25)])

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files[index]

    def __getitems__(self, keys):
        images, labels, bad = [], [], {}
        for epoch, index in keys:
            torch.random.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            for index in range(index, index + 100):
                index %= len(self.files)
                try:
                    images.append(self.load(self.files[index]))
                    labels.append(self.labels[index])
                    break
                except Exception as error:  # a bad file can raise nearly anything
                    bad[self.files[index]] = f"{type(error).__name__}: {error}"
            else:
                raise ValueError(f"100 files in a row are unreadable, such as {list(bad)[:3]}")
        return torch.stack(images), torch.tensor(labels), bad

    def load(self, path):
        with Image.open(path) as image:
            image = as_seen(image)
            height, width = self.size
            if self.augment is None:
                zoom = 256 / 224 * max(height / image.height, width / image.width)
                w, h = width / zoom, height / zoom
                x, y = (image.width - w) / 2, (image.height - h) / 2
            else:
                y, x, h, w = random_box(image, self.scale)
            image = image.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
            image = v2.functional.pil_to_tensor(image)
        if self.augment and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return self.finish(image) if self.augment == "full" else image


def random_box(image, scale):
    """The box (top, left, height, width) of a random resized crop."""
    from torchvision.transforms import RandomResizedCrop
    return RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))


def as_seen(image):
    """A Pillow image as RGB, as a person sees it: upright, on white, 16-bit grey scaled down."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.point(lambda v: v / 256).convert("L")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def scan(folder):
    """A folder -> (files, labels, classes): one class a folder, or labels None if there is none."""
    endings = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
    files = sorted(str(path) for path in Path(folder).rglob("*")
                   if path.suffix.lower() in endings and not path.is_dir())
    if not files:
        raise ValueError(f"--data: no image in {folder}")
    parts = [Path(file).relative_to(folder).parts for file in files]
    if any(len(part) < 2 for part in parts):
        return files, [-1] * len(files), None
    classes = sorted({part[0] for part in parts})
    numbers = {name: number for number, name in enumerate(classes)}
    return files, [numbers[part[0]] for part in parts], classes


def load_data(args, size):
    """--data -> (training source, the same without augmentation, labelled val source or None)."""
    if args.data.startswith("digits"):
        count = int(args.data.partition(":")[2] or 0)
        train = Digits(count or 76800, seed_of(args.seed, "train"), fixed=bool(count))
        return train, Digits(2000, seed_of(args.seed, "bank"), True), Digits(1000, -1, True)
    root = Path(args.data)
    if not root.is_dir():
        raise ValueError(f"--data: {args.data} is no folder")
    labelled = (root / "train").is_dir()
    files = scan(root / "train" if labelled else root)
    augment, scale = ("full" if args.task == "finetune" else "crop"), (0.08, 1.0)
    scale = (0.2, 1.0) if args.task == "pretrain" else scale
    train = Folder(*files, size, args.seed, scale, augment)
    val = None
    if (root / "val").is_dir() and train.classes:
        val = Folder(*scan(root / "val"), size, args.seed)
        if odd := sorted(set(val.classes or ["(none)"]) - set(train.classes)):
            raise ValueError(f"--data: val has classes that train lacks: {', '.join(odd[:3])}")
        val.labels = [train.classes.index(val.classes[label]) for label in val.labels]
    return train, Folder(*files, size, args.seed), val


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


def sample_keys(count, seed, positions):
    """Positions in the run's endless stream of samples -> keys (epoch, index): every epoch is a
    permutation, and batches run across its end."""
    return [(p // count, permutation(count, seed, p // count)[p % count]) for p in positions]


def identity(batch):
    return batch


def loader(source, batches, args, device):
    return torch.utils.data.DataLoader(
        source, batch_sampler=batches, collate_fn=identity, num_workers=args.workers,
        pin_memory=device.type == "cuda", prefetch_factor=4 if args.workers else None)


# --- What is trained ----------------------------------------------------------------------------

class Classifier(nn.Module):
    """Encoder, mean of the patch tokens, LayerNorm and linear head; for a probe the encoder is
    frozen and the norm is a BatchNorm without affine. Images [B,3,H,W] -> logits [B,classes]."""

    def __init__(self, student, classes, probe):
        super().__init__()
        self.student, self.probe = student.requires_grad_(not probe), probe
        student.norm.requires_grad_(False)
        norm = nn.BatchNorm1d if probe else nn.LayerNorm
        options = dict(affine=False) if probe else {}
        self.head = nn.Sequential(norm(student.dim, eps=1e-6, **options),
                                  nn.Linear(student.dim, classes))
        nn.init.normal_(self.head[1].weight, std=0.01)
        nn.init.zeros_(self.head[1].bias)

    def train(self, mode=True):
        super().train(mode)
        self.student.train(mode and not self.probe)
        return self

    def forward(self, images, noise=None):
        return self.head(self.student(images, noise=noise)[-1][:, 1:].mean(dim=1))


def param_groups(model, weight_decay, layer_decay=1.0):
    """Trainable parameters in groups by learning-rate scale and weight decay. None for 1-D
    parameters and W; layer l of S is scaled by layer_decay^(S+1−l), the head by 1."""
    depth, groups = len(model.student.blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = depth + 1
        if name.startswith("student.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith("student."):
            layer = 0
        decays = parameter.ndim > 1 and name != "align.matrix"
        key = layer_decay ** (depth + 1 - layer), weight_decay if decays else 0.0
        groups.setdefault(key, []).append(parameter)
    return [dict(params=params, scale=scale, weight_decay=decay)
            for (scale, decay), params in groups.items()]


def learning_rate(step, steps, warmup, peak, floor):
    """Linear warm-up to peak over `warmup` steps, then a cosine that ends at floor."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# --- Evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def outputs(function, source, args, device):
    """function(images) for every image of a source, each once at any world size -> ([n,C] in
    order, labels [n]), on every rank."""
    rank, world = place()
    share = range(rank, len(source), world)
    batches = [[(0, i) for i in share[at:at + 256]] for at in range(0, len(share), 256)]
    rows = [function(images.to(device)).float() for images, _, _ in loader(source, batches, args,
                                                                           device)]
    rows = torch.cat(rows)
    if world > 1:
        rows = F.pad(rows, (0, 0, 0, math.ceil(len(source) / world) - len(rows)))
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows)
        rows = rearrange(torch.stack(parts), "rank i c -> (i rank) c")[:len(source)]
    labels = [i % 10 for i in range(len(source))] if isinstance(source, Digits) else source.labels
    return rows, torch.tensor(labels, device=device)


def knn(encoder, bank, val, args, device):
    """k-NN accuracy in percent of an encoder (or a Teacher) on val, by its neighbours in bank:
    cosine of mean patch tokens of the last block, votes weighed by exp(cosine / temperature)."""
    def feature(images):
        levels = encoder(images)
        levels = levels[0] if isinstance(levels, tuple) else levels
        return F.normalize(maskalign.whiten(levels[-1][:, 1:].mean(dim=1)), dim=1)
    training = encoder.training
    encoder.eval()
    (keys, classes), (queries, truth) = (outputs(feature, s, args, device) for s in (bank, val))
    encoder.train(training)
    right = 0
    for query, label in zip(queries.split(256), truth.split(256)):
        cosine, index = (query @ keys.T).topk(min(KNN["k"], len(keys)), dim=1)
        votes = torch.zeros(len(query), int(classes.max()) + 1, device=device)
        votes.scatter_add_(1, classes[index], (cosine / KNN["temperature"]).exp())
        right += (votes.argmax(dim=1) == label).sum().item()
    return 100 * right / len(truth)


def evaluate(model, bank, val, args, device):
    """-> dict of results in percent: knn for pre-training, else top1 and top5."""
    if args.task == "pretrain":
        return dict(knn=knn(model.student, bank, val, args, device))
    model.eval()
    logits, truth = outputs(model, val, args, device)
    model.train()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]
    return dict(top1=100 * hits[:, 0].float().mean().item(),
                top5=100 * hits.any(dim=1).float().mean().item())


# --- Processes and files ------------------------------------------------------------------------

def place():
    """-> (rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def write(path, data):
    """Bytes to a file, whole or not at all."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def pack(state):
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def open_checkpoint(path):
    """last.pt -> its contents, each byte checked. Raises ValueError on a damaged file."""
    try:
        damaged = zipfile.ZipFile(path).testzip()
    except Exception as error:
        damaged = error
    if damaged:
        raise ValueError(f"{path} is damaged ({damaged}); restore it from a copy, or start anew "
                         "with another --out")
    return read_weights(path)


# --- The one loop -------------------------------------------------------------------------------

def train(args):
    """Run one task; returns (model, teacher or None, results)."""
    rank, world = place()
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    amp = args.amp or ("off" if device.type != "cuda" else
                       "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)[amp]
    compiled = device.type == "cuda" if args.compile is None else args.compile

    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {world} processes")
    share = args.batch_size // world
    micro = max(m for m in range(1, min(share, args.micro_batch) + 1) if share % m == 0)
    torch.manual_seed(args.seed)
    student = vit(args.student, drop_path=args.drop_path)
    source, bank, val = load_data(args, student.image_size)
    if args.init:
        aside = load_encoder(student, read_weights(args.init), args.init)
    teacher = None
    if args.task == "pretrain":
        teacher = load_teacher(args.teacher, args.teacher_weights, args.levels).to(device, dtype)
        model = MaskAlign(student, teacher, args.mask, args.mask_ratio)
        rest = model.align
    else:
        if not source.classes:
            raise ValueError(f"--task {args.task} needs labels: a folder for each class in train/")
        model = Classifier(student, len(source.classes), args.task == "probe")
        rest = model.head
    model.to(device).train()
    peak = args.blr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimiser = torch.optim.SGD(groups, lr=peak, momentum=0.9, fused=True) if args.task == "probe" \
        else torch.optim.AdamW(groups, lr=peak, fused=True,
                               betas=(0.9, 0.95 if args.task == "pretrain" else 0.999))
    # a scale of 1 but for fp16: what stays is that a step with a non-finite gradient is skipped
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0 if amp == "fp16" else 1.0,
                                  growth_interval=2000 if amp == "fp16" else 2**31 - 1)
    steps = max(1, int(args.epochs * len(source) / args.batch_size))
    warmup = int(args.warmup_epochs * len(source) / args.batch_size)

    out, start, results, meter = Path(args.out), 0, {}, torch.zeros(2, device=device)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings["images"] = len(source)
    if (out / "last.pt").exists():
        state = open_checkpoint(out / "last.pt")
        odd = [f"{key} {state['arguments'].get(key)} -> {value}" for key, value in settings.items()
               if state["arguments"].get(key) != value]
        if odd:
            raise ValueError(f"{out}/last.pt is of a run with other arguments: {', '.join(odd)}; "
                             "repeat these, or choose another --out")
        load_strict(student, state["student"], out / "last.pt")
        load_strict(rest, state["rest"], out / "last.pt")
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        start, results, meter = state["step"], state["results"], state["meter"].to(device)
    elif (out / "log.jsonl").exists():
        raise ValueError(f"{out} holds a log.jsonl but no last.pt; choose another --out")

    def save(step):
        if rank == 0:
            state = dict(student=student.state_dict(), rest=rest.state_dict(), step=step,
                         optimiser=optimiser.state_dict(), scaler=scaler.state_dict(),
                         arguments=settings, results=results, meter=meter)
            write(out / "student.pt", pack(student.state_dict()))
            write(out / "last.pt", pack(state))

    if rank == 0:
        print(f"{args.task}: {args.student} on {args.data}, {len(source)} images, "
              + (f"teacher {args.teacher} ({args.teacher_weights}), " if teacher else "")
              + f"{steps} steps of {args.batch_size} = {world} processes x {share // micro} x "
              f"{micro}, lr {peak:.2e}, {device.type} {amp}, compile {compiled}", flush=True)
        if val is None:
            print("no labelled val: evaluation is skipped")
        out.mkdir(parents=True, exist_ok=True)
        lines = (out / "log.jsonl").read_text().splitlines(True) if start else []
        lines = [line for line in lines if line.endswith("\n")
                 and json.loads(line)["step"] <= start]
        if start == 0:
            save(0)
        write(out / "log.jsonl", "".join(lines).encode())
    if start >= steps:
        print(f"{out} holds a finished run of {steps} steps")
        return model, teacher, results

    run, observe = model, teacher
    if compiled:
        run = torch.compile(run)
        observe = teacher and torch.compile(teacher)
    if world > 1:
        run = nn.parallel.DistributedDataParallel(run, gradient_as_bucket_view=True)
    autocast = torch.autocast(device.type, dtype, enabled=amp != "off")
    generator = torch.Generator(device)
    columns = 2 * len(student.blocks) + (math.prod(student.grid) if teacher else 0)
    batches = (sample_keys(len(source), args.seed, range(at, at + micro))
               for step in range(start, steps)
               for at in range(step * args.batch_size + rank * share,
                               step * args.batch_size + (rank + 1) * share, micro))
    stream = iter(loader(source, batches, args, device))
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    health, waited, since = torch.ones((), device=device), 0.0, time.perf_counter()
    bar = tqdm(total=steps, initial=start, disable=None if rank == 0 else True, unit="step")
    for step in range(start, steps):
        lr = learning_rate(step, steps, warmup, peak, args.min_lr)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["scale"]
        noise = torch.rand(args.batch_size, columns, device=device,
                           generator=generator.manual_seed(seed_of(args.seed, "step", step)))
        noise = noise[rank * share:(rank + 1) * share]
        total = torch.zeros((), device=device)
        for part in range(share // micro):
            asked = time.perf_counter()
            images, labels, bad = next(stream)
            waited += time.perf_counter() - asked
            images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
            last = part == share // micro - 1
            with contextlib.nullcontext() if last or world == 1 else run.no_sync(), autocast:
                piece = noise[part * micro:(part + 1) * micro]
                if teacher:
                    with torch.autocast(device.type, enabled=False):
                        levels, attention = observe(images)
                    loss = run(images, levels, attention, noise=piece)
                else:
                    loss = F.cross_entropy(run(images, piece).float(), labels, label_smoothing=0.1)
            scaler.scale(loss * health / (share // micro)).backward()
            total += loss.detach() / (share // micro)
        scaler.unscale_(optimiser)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # once NaN, health makes every later gradient NaN, on all ranks, and no step is taken
        sound = (total if amp == "fp16" else total + norm).isfinite()
        health = torch.where(sound, health, math.nan)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        meter += torch.stack([total, torch.ones_like(total)])
        done = step + 1
        if done % LOG_EVERY == 0 or done == steps:
            mean = meter[0] / meter[1]
            if world > 1:
                dist.all_reduce(mean)
            now = time.perf_counter()
            taken = now - since
            if not math.isfinite(mean.item()):
                raise FloatingPointError(
                    f"non-finite loss or gradient by step {done}, rank {rank}, lr {lr:.3g}; "
                    f"{out}/last.pt is from before it")
            record = dict(step=done, epoch=done * args.batch_size / len(source),
                          loss=mean.item() / world, lr=lr, grad_norm=norm.item(),
                          images_per_s=meter[1].item() * args.batch_size / taken,
                          data_wait=waited / taken)
            meter.zero_()
            crossed = int(record["epoch"] // args.eval_every) > int(
                (done - LOG_EVERY) * args.batch_size / len(source) // args.eval_every)
            if val is not None and (crossed or done == steps):
                results = evaluate(model, bank, val, args, device)
                record.update(results)
            if rank == 0:
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
                bar.update(min(LOG_EVERY, done - start))
                line = " ".join(f"{key} {value:.4g}" for key, value in record.items())
                bar.set_postfix_str(line)
                if bar.disable and (done % (LOG_EVERY * max(1, steps // 100)) == 0
                                    or done == steps):
                    print(line, flush=True)
            waited, since = 0.0, time.perf_counter()
        if done % args.save_every == 0 or done == steps or stop:
            save(done)
        if stop:
            raise SystemExit(143)
    bar.close()
    signal.signal(signal.SIGTERM, previous)
    return model, teacher, results


def demo(args):
    """Digits without downloads: a teacher with labels, a student by MaskAlign without."""
    out = Path(args.out)
    teach = parse(["--task", "finetune", "--out", str(out / "teacher"), "--seed", str(args.seed)])
    train(teach)
    args.teacher_weights, args.out = str(out / "teacher" / "student.pt"), str(out / "student")
    model, teacher, results = train(args)
    device = next(model.parameters()).device
    _, bank, val = load_data(args, model.student.image_size)
    torch.manual_seed(args.seed)
    untrained = vit(args.student).to(device)
    rows = [knn(network, bank, val, args, device) for network in (untrained, teacher)]
    print(f"k-NN (k {KNN['k']}, temperature {KNN['temperature']}, mean patch token): "
          f"untrained student {rows[0]:.1f} %, trained student {results['knn']:.1f} %, "
          f"teacher {rows[1]:.1f} %")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=RECIPES, default="pretrain")
    for key in dict.fromkeys(key for recipe in RECIPES.values() for key in recipe):
        values = {task: recipe[key] for task, recipe in RECIPES.items() if key in recipe}
        kind = type(next(iter(values.values())))
        flag = "--" + key.replace("_", "-")
        text = ", ".join(f"{task} {value}" for task, value in values.items())
        if key == "compile":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction,
                                help="default: on CUDA")
        else:
            choices = dict(amp=("bf16", "fp16", "off"), mask=("attentive", "random")).get(key)
            parser.add_argument(flag, type=str if kind is type(None) else kind, choices=choices,
                                help=f"default: {text}")
    given = vars(parser.parse_args(argv))
    given = {key: value for key, value in given.items() if value is not None}
    recipe = dict(RECIPES[given["task"]])
    if given.get("data", recipe["data"]).startswith("digits"):
        recipe.update({key: value for key, value in DIGITS.items() if key in recipe},
                      blr=DIGITS_LR[given["task"]])
    elif "teacher" not in given and given["task"] == "pretrain":
        recipe["teacher_weights"] = "openai"
    args = argparse.Namespace(**{**recipe, **given})
    if args.workers is None:
        args.workers = 0 if args.data.startswith("digits") else min(16, os.cpu_count())
    args.workers = int(args.workers)
    return args


def main(argv=None):
    """Run a command line in this process. Errors of use are one line and exit code 2."""
    args = parse(argv)
    try:
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() and args.device != "cpu"
                                    else "gloo")
        if args.task == "pretrain" and args.data == "digits" and args.teacher_weights is None:
            demo(args)
        else:
            train(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
