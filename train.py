"""Train and evaluate with MaskAlign (maskalign.py).

    python train.py                                                  # demo: digits, no download
    torchrun --nproc_per_node=8 train.py --data /imagenet            # the paper's pre-training
    python train.py --task finetune --init out/student.pt --data /imagenet --out tune   # or probe

--data             a folder with train/ and val/ of one folder per class; any folder of images;
                   digits, drawn as needed, or digits:N, the same N in every epoch
--out              folder of last.pt, student.pt, log.jsonl; a run that is found there goes on
--student          a size in maskalign.VITS; --image-size N or HxW: pixels, if not the student's own
--init             a file of weights to start from
--teacher          a ViT of open_clip, of timm, or in maskalign.VITS
--teacher-weights  pretrained: as published; random: for timing; a tag of open_clip; a file
--levels           K, the last blocks of the teacher that are aligned
--batch-size       images of an optimiser step, of all processes; --micro-batch: the most that one
                   process has in a forward pass; gradients are accumulated as needed
--blr              learning rate of 256 images, in proportion for others; --min-lr: the last step's
--save-every       optimiser steps; --eval-every, --epochs and --warmup-epochs: epochs
--drop-path        of the last block; --layer-decay: of the learning rate, from block to block
--amp              bf16, fp16 or off, if not the best that the device has; --compile: as on CUDA

Order below: recipes and command line, data, schedule, model and optimiser, evaluation, checkpoints,
the loop, entry. A rank is a process, as in torch; all of them share the images of a step.
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.optim import param_groups_layer_decay
from timm.utils import accuracy
from torch import distributed as dist, multiprocessing, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from maskalign import (
    MaskAlign, UsageError, load_encoder, load_teacher, read_weights, vit, whiten)

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine
# on Linux a process may use fewer CPUs than there are
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LOG_EVERY = 10  # optimiser steps; in between the host does not wait for the GPU
KNN = dict(k=20, temperature=0.07)
EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jp2")
PRECISIONS = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)

# --- Recipes and command line: each default stands here, once -----------------------------------
RECIPES = {  # the paper's, for ViT-B on ImageNet
    "pretrain": dict(epochs=200.0, warmup_epochs=20.0, batch_size=1024, blr=1.5e-4, min_lr=1e-5,
                     weight_decay=0.05, drop_path=0.1, layer_decay=1.0, eval_every=20.0),
    "finetune": dict(epochs=100.0, warmup_epochs=5.0, batch_size=1024, blr=3e-4, min_lr=1e-6,
                     weight_decay=0.05, drop_path=0.2, layer_decay=0.55, eval_every=1.0),
    "probe": dict(epochs=90.0, warmup_epochs=10.0, batch_size=16384, blr=0.025, min_lr=0.0,
                  weight_decay=0.0, drop_path=0.0, layer_decay=1.0, eval_every=1.0)}
COMMON = dict(
    task="pretrain", data="digits", out="out", init=None, seed=0,
    student="vit_base_patch16_224", teacher="ViT-B-16-quickgelu", teacher_weights="pretrained",
    levels=5, mask="attentive", mask_ratio=0.7, micro_batch=256, save_every=1000, amp=None,
    device=None, workers=max(1, min(16, CPUS // LOCAL_WORLD)))
DIGITS = dict(  # for --data digits, whatever the task
    epochs=1.0, warmup_epochs=0.1, batch_size=64, blr=8e-3, min_lr=1e-6,
    weight_decay=0.05, drop_path=0.0, layer_decay=1.0, eval_every=1.0,
    student="vit_digits_patch4_32", teacher="vit_digits_patch4_32", levels=3, workers=0)
CHOICES = dict(task=RECIPES, mask=("attentive", "random"), amp=PRECISIONS)
HIGHEST = dict(mask_ratio=1, drop_path=0.99, layer_decay=1)
MAY_BE_0 = {
    "min_lr", "warmup_epochs", "weight_decay", "drop_path", "mask_ratio", "workers", "seed"}
FREE = {"out", "data", "workers", "device", "compile", "micro_batch", "save_every",
        "eval_every", "local_rank"}  # what may differ when a run goes on


def image_size(text):
    """"N" or "HxW" -> (height, width) in pixels."""
    height, _, width = text.partition("x")
    size = int(height), int(width or height)
    if min(size) < 1:
        raise ValueError
    return size


def parse(argv):
    """A command line -> all arguments, with the task's defaults. UsageError if they cannot be."""
    parser = argparse.ArgumentParser(
        "train.py", usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"defaults: {COMMON}\n\nby task: {RECIPES}\n\nfor digits: {DIGITS}")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--image-size", type=image_size)
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)  # of torch.distributed.launch
    for name, default in (COMMON | RECIPES["pretrain"]).items():
        kind = str if default is None else type(default)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, choices=CHOICES.get(name))
    first = parser.parse_args(argv)
    digits = DIGITS if first.data.partition(":")[0] == "digits" else {}
    parser.set_defaults(**RECIPES[first.task] | digits)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        lowest = 0 if name in MAY_BE_0 else 1e-12
        highest = HIGHEST.get(name, 2 ** 31)
        is_number = type(value) in (int, float)
        if value == "" or (is_number and not lowest <= value <= highest):
            raise UsageError(f"--{name.replace('_', '-')} cannot be {value!r}")
    if args.warmup_epochs > max(args.epochs, DIGITS["warmup_epochs"]):
        raise UsageError(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs "
                         f"{args.epochs:g}")
    if args.batch_size % WORLD:
        raise UsageError(f"--batch-size {args.batch_size} is not divisible by {WORLD} ranks")
    choose_device(args)
    return args


def choose_device(args):
    """Settle args.device and args.amp. UsageError if the device is not there."""
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        args.device = torch.device(args.device or best)
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"--device {args.device}: {error}") from error
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.amp = args.amp or (half if args.device.type == "cuda" else "off")


# --- Data: an image depends on (seed, epoch, index) alone ---------------------------------------
def seed_of(*key):
    """Any key -> a 63-bit seed, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Digits:
    """`count` digits in random places, sizes and colours, as images of a size (H, W), in every
    epoch the same if `fixed`. As from every source: source[keys], of a micro-batch of keys
    (epoch, index) -> images uint8 [b,3,H,W], labels [b]."""
    def __init__(self, count, size, seed, fixed):
        self.count, self.size, self.seed, self.fixed = count, size, seed, fixed
        self.classes = list("0123456789")
        height, width = size
        font = ImageFont.load_default(height * 7 / 8)  # Pillow's own
        self.glyphs = torch.zeros(10, 1, height, width)
        for glyph, digit in zip(self.glyphs, self.classes):
            image = Image.new("L", (width, height))
            ImageDraw.Draw(image).text((width / 2, height / 2), digit, 255, font, "mm")
            glyph += v2.functional.pil_to_tensor(image) / 255

    def __len__(self):
        return self.count

    def name(self, index):
        """What an image is called in messages."""
        return index

    def __getitem__(self, keys):
        noise = []
        for epoch, index in keys:
            seed = seed_of(self.seed, 0 if self.fixed else epoch, index)
            noise.append(torch.rand(55, generator=torch.Generator().manual_seed(seed)))
        u = torch.stack(noise, dim=1)
        labels = torch.tensor([index % 10 for _, index in keys])
        angle = u[0] - 0.5
        scale = 0.8 + 0.8 * u[1]
        x, y = (u[2:4] - 0.5) * 0.6 * scale
        cos = angle.cos() * scale
        sin = angle.sin() * scale
        theta = rearrange([cos, -sin, x, sin, cos, y], "(i j) b -> b i j", i=2)
        grid = F.affine_grid(theta, [len(keys), 1, *self.size], align_corners=False)
        alpha = F.grid_sample(self.glyphs[labels], grid, align_corners=False)
        ink = rearrange(0.8 + 0.2 * u[4:7], "c b -> b c 1 1")
        ground = rearrange(0.15 * u[7:], "(c h w) b -> b c h w", c=3, h=4)
        ground = F.interpolate(ground, self.size, mode="bilinear", align_corners=False)
        images = ground + alpha * (ink - ground)
        return (images * 255).round().byte(), labels


def as_seen(image):
    """A Pillow image -> RGB as a viewer shows it: upright, on white, deep grey in its range."""
    with contextlib.suppress(Exception):  # turns the picture, and may fail at an odd tag after that
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 or 32 bits; resizing leaves floats a little above their white
        most = image.getextrema()[1] if image.mode == "F" else 65535
        white = 1 if most < 2 else 255 if most < 256 else 65535
        image = image.convert("F").point(lambda x: x * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def augmentation(task, size):
    """A task's random crops and more, or just the centre: a Pillow image -> uint8 [3,H,W]."""
    if task is None:  # 7/8 of the shorter side, cut out before it is resized
        fit = functools.partial(ImageOps.fit, size=size[::-1], method=Image.BICUBIC, bleed=1 / 16)
        return v2.Compose([fit, v2.PILToTensor()])
    area = (0.2 if task == "pretrain" else 0.08, 1.0)
    crop = v2.RandomResizedCrop(size, area, interpolation=Image.BICUBIC)
    more = [v2.RandAugment(2, 9), v2.RandomErasing(0.25)] if task == "finetune" else []
    return v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip(), *more])


class Folder:
    """Images {file: class} in a folder, augmented for a task or, without one, centred. Names and
    bad files are tensors, which the loader's workers share, where each would copy a list."""
    def __init__(self, root, classes, size, files, seed, task=None):
        self.classes, self.size, self.seed = classes, size, seed
        self.augment = augmentation(task, size)
        names = numpy.array([os.fsencode(os.path.join(root, file)) for file in files])
        self.names = torch.from_numpy(names.view("u1").reshape(len(files), -1))
        labels = numpy.searchsorted(classes or [""], list(files.values()))
        self.labels = torch.from_numpy(labels)
        self.bad = torch.zeros(len(files), dtype=torch.bool)

    def __len__(self):
        return len(self.bad)

    def name(self, index):
        """A file, by its number."""
        return os.fsdecode(self.names[index].numpy().tobytes().rstrip(b"\0"))

    def read(self, epoch, index):
        """An image uint8 [3,H,W] and its label; the next readable one's if it cannot be read, which
        is said once. UsageError if more than ten and more than a hundredth of all cannot."""
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
        while True:
            name = self.name(index)
            try:
                with Image.open(name) as image:
                    # a JPEG may be decoded at 1/2, 1/4 or 1/8
                    image.draft(None, [4 * side for side in self.size[::-1]])
                    return self.augment(as_seen(image)), self.labels[index]
            except Exception as error:  # a bad file can raise nearly anything
                if not self.bad[index]:
                    print(f"unreadable, its neighbour stands in: {name}: {error!r}",
                          file=sys.stderr)
                self.bad[index] = True
            bad = self.bad.sum().item()
            if bad > min(len(self) - 1, max(10, len(self) // 100)):
                raise UsageError(f"{bad} of {len(self)} files are unreadable, the last {name}")
            index = (index + 1) % len(self)

    def __getitem__(self, keys):
        images, labels = zip(*[self.read(*key) for key in keys])
        return torch.stack(images), torch.stack(labels)


def scan(root):
    """The images in a folder and below, sorted, as paths from there with "/" between folders.
    Hidden entries, as .ipynb_checkpoints and a Mac's ._x.jpg and __MACOSX, are none."""
    found = []
    for at, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        at = Path(os.path.relpath(at, root))
        found += [(at / name).as_posix() for name in names
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(found)


def labelled(files, split):
    """Those of the files that lie in class folders of a split -> {file: class}."""
    return {file: file.split("/")[1] for file in files if re.match(f"{split}/.+/", file)}


def open_data(args, size):
    """--data, at size (H, W) -> sources: to train on, k-NN's bank of neighbours, and the labelled
    one to evaluate on, or None. UsageError without images, or if val's classes are not train's."""
    if digits := re.fullmatch(r"digits(?::([1-9]\d{0,8}))?", args.data):
        count = int(digits[1] or 76800)
        data = Digits(count, size, seed_of(args.seed, "train"), fixed=bool(digits[1]))
        bank = Digits(2000, size, seed_of(args.seed, "bank"), fixed=True)
        return data, bank, Digits(1000, size, -1, fixed=True)
    # a network disk may show each rank another folder
    files = gather(scan(args.data) if RANK == 0 else None)[0]
    train = labelled(files, "train")
    val = labelled(files, "val")
    classes = sorted(set(train.values()))
    odd = sorted(set(val.values()) - set(classes))
    if not classes:  # nor labels
        train = {file: "" for file in files if not file.startswith("val/")}
        val = {}
    elif odd or (not val and Path(args.data, "val").exists()):
        raise UsageError("--data: val has no class folders with images, or others than train: "
                         f"{odd[:3]}")
    if not train:
        raise UsageError(f"--data: there is no such folder, or no image in it: {args.data}")
    of = functools.partial(Folder, args.data, classes, size)
    return of(train, args.seed, args.task), of(train, 0), of(val, 0) if val else None


def loader(source, batches, args):
    """Yields source[keys] for each list of keys in batches, from worker processes. UsageError if
    what they hold ready exceeds shared memory, for which they would wait for ever."""
    held = 2 * args.workers * LOCAL_WORLD * args.micro_batch * 3 * math.prod(source.size)
    memory = "/dev/shm"
    if os.path.isdir(memory) and held > shutil.disk_usage(memory).free:
        raise UsageError(f"workers need {held >> 20} MiB of /dev/shm: lower --workers or "
                         "--micro-batch, or give a container more (docker run --shm-size)")
    # a fork could hang where threads are; a fork server starts a worker from these imports at once
    start = "forkserver" if sys.platform == "linux" else "spawn"
    multiprocessing.set_forkserver_preload(["timm", "torchvision"])
    yield from DataLoader(
        source, batch_size=None, sampler=batches, num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
        multiprocessing_context=start if args.workers else None)


# --- Schedule: what belongs to a step -----------------------------------------------------------
@functools.lru_cache(maxsize=2)
def order(count, seed, epoch):
    """The order of an epoch's images: a permutation of range(count)."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


class Schedule:
    """Rate, images and noise of a step, by (seed, step) alone, at any number of ranks: a run can be
    cut anywhere and go on. A rank has `share` images of a step, in `parts` of at most `micro`."""
    def __init__(self, args, count):
        self.args, self.count = args, count
        self.per_epoch = count / args.batch_size  # steps
        self.steps = max(1, int(args.epochs * self.per_epoch))
        self.warmup = int(args.warmup_epochs * self.per_epoch)
        self.peak = args.blr * args.batch_size / 256
        self.share = args.batch_size // WORLD
        self.parts = math.ceil(self.share / args.micro_batch)
        self.micro = math.ceil(self.share / self.parts)
        if args.task == "probe" and self.share == 1 + self.micro * (self.parts - 1):
            raise UsageError("a probe's BatchNorm needs two images in every micro-batch: change "
                             "--batch-size or --micro-batch")

    def rate(self, step):
        """Learning rate: linear warm-up to the peak, then a cosine that ends at min_lr."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step + 1 - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.args.min_lr + (self.peak - self.args.min_lr) * cosine

    def evaluates(self, first, done):
        """Whether an evaluation falls due between two steps."""
        every = self.args.eval_every * self.per_epoch
        return done == self.steps or int(done / every) > int(first / every)

    def keys(self, step, rank):
        """The (epoch, index) of a rank's images."""
        first = step * self.args.batch_size + rank * self.share
        places = [divmod(at, self.count) for at in range(first, first + self.share)]
        return [(epoch, order(self.count, self.args.seed, epoch)[at]) for epoch, at in places]

    def batches(self, done):
        """The keys of this rank's micro-batches, from step `done` on."""
        for step in range(done, self.steps):
            yield from BatchSampler(self.keys(step, RANK), self.micro, drop_last=False)

    def noise(self, step, width):
        """Uniform noise [b,width] for each micro-batch of this rank."""
        device = self.args.device
        generator = torch.Generator(device).manual_seed(seed_of(self.args.seed, "step", step))
        noise = torch.rand(WORLD, self.share, width, generator=generator, device=device)
        return noise[RANK].split(self.micro)


# --- Model and optimiser ------------------------------------------------------------------------
class Classifier(nn.Module):
    """Images [B,3,H,W] -> logits [B,classes], from the mean patch token, normed. A probe trains the
    head alone. Names are those of timm's models with global_pool="avg"."""
    def __init__(self, student, classes, probe):
        super().__init__()
        self.student = student.requires_grad_(not probe)
        student.norm.requires_grad_(False)
        self.fc_norm = nn.LayerNorm(student.dim, eps=1e-6)
        if probe:
            self.fc_norm = nn.BatchNorm1d(student.dim, affine=False)
        self.head = nn.Linear(student.dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)

    def timm_state(self):
        """What timm.create_model(name, num_classes=C, global_pool="avg") loads strictly; but a
        probe's fc_norm is a BatchNorm."""
        return {name.removeprefix("student."): x for name, x in self.state_dict().items()
                if not name.startswith("student.norm.")}

    def forward(self, images, path_noise=None):
        tokens = self.student(images, path_noise=path_noise)[-1]
        return self.head(self.fc_norm(tokens[:, 1:].mean(dim=1)))


def build(args):
    """The task's model, teacher or None, and sources. UsageError if they do not fit together."""
    torch.manual_seed(args.seed)
    student = vit(args.student, drop_path=args.drop_path, image_size=args.image_size)
    teacher = None
    sources = open_data(args, student.image_size)
    classes = sources[0].classes
    if args.task == "pretrain":
        weights = None if args.teacher_weights == "random" else args.teacher_weights
        teacher = load_teacher(args.teacher, weights, args.levels, student.grid)
        teacher = teacher.to(args.device, PRECISIONS[args.amp])
        model = MaskAlign(student, teacher, args.mask, args.mask_ratio)
    elif len(classes) < 2:
        raise UsageError(f"--task {args.task} needs two class folders or more, not {classes}")
    else:
        model = Classifier(student, len(classes), args.task == "probe")
    return model.to(args.device), teacher, sources


def layers(coarse):
    """The layers of a model's parameters, first to last, by their names, in timm's words."""
    block, last = r"student\.blocks\.(\d+)", ("", (99,))  # 99: after all blocks
    return dict(stem=r"student\.[^b]", blocks=[(block, None), last])


def make_optimiser(model, args):
    """AdamW, or SGD for a probe. Block l of S learns at layer_decay^(S+1-l) times the head's rate.
    1-D parameters and align.matrix are not decayed; nor are [CLS] and positions when fine-tuned."""
    tuned = isinstance(model, Classifier)
    exempt = ["student.cls_token", "student.pos_embed"] if tuned else ["align.matrix"]
    model.group_matcher = layers
    groups = param_groups_layer_decay(
        model, args.weight_decay, exempt, layer_decay=args.layer_decay)
    if args.task != "probe":
        return torch.optim.AdamW(groups, betas=(0.9, 0.999 if tuned else 0.95), fused=True)
    optimiser = torch.optim.SGD(groups, momentum=0.9, fused=True)
    # fused SGD leaves this unset if fp16 skips the first step
    for parameter in model.head.parameters():
        optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


def make_scaler(args):
    """fp16's gradient scaler. Else the scale is 1, below it after a gradient that is not finite,
    and all that it does is to take no step with one, without asking the device."""
    kind = args.device.type
    if args.amp == "fp16":
        return torch.amp.GradScaler(kind)
    return torch.amp.GradScaler(kind, init_scale=1.0, growth_interval=2 ** 31 - 1)


def autocast(args):
    """The precision --amp, as a context for what is trained and rated."""
    return torch.autocast(args.device.type, PRECISIONS[args.amp], enabled=args.amp != "off")


def poisoned(loss):
    """The loss, with a NaN gradient if it is not finite, so that no rank takes the step."""
    return loss * (1 + 0 * loss.detach())  # 0·inf = NaN


def mixing(data, args):
    """Fine-tuning's mixup or cutmix of a micro-batch, or None."""
    if args.task == "finetune" and isinstance(data, Folder):
        classes = len(data.classes)
        return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                                v2.CutMix(num_classes=classes)])


# --- Evaluation: the ranks share the images -----------------------------------------------------
def gather(mine):
    """Any object -> every rank's, by rank; all wait for the last."""
    ranks = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(ranks, mine)
    return ranks


@torch.no_grad()
def outputs(function, source, args):
    """function(images) and labels of this rank's images of a source: [m,…] and [m]."""
    # the sampler ends with some of other ranks' images, so that no rank is without one
    share = DistributedSampler(source, WORLD, RANK, shuffle=False)
    batches = BatchSampler([(0, index) for index in share], args.micro_batch, drop_last=False)
    with autocast(args):
        rows = [(function(images.to(args.device)).float(), labels)
                for images, labels in loader(source, batches, args)]
    own = len(range(RANK, len(source), WORLD))
    return [torch.cat(column)[:own] for column in zip(*rows)]


def everyone(rows, dim=0):
    """Every rank's rows, tensors [m,…] -> all of them, on the CPU."""
    return torch.cat(gather(rows.cpu()), dim)


def knn(encoder, bank, val, args):
    """k-NN accuracy on val in percent: cosine of whitened mean patch tokens of encoder(images)[-1].
    Each rank keeps its share of the bank, and only the nearest k of it travel."""
    def feature(images):
        return F.normalize(whiten(encoder(images)[-1][:, 1:].mean(dim=1)), dim=1)
    keys, classes = outputs(feature, bank, args)
    queries, labels = map(everyone, outputs(feature, val, args))
    near = []  # cosine and class [2,q,≤k] of the nearest in this share, for each micro-batch
    for query in queries.to(args.device).split(args.micro_batch):
        cosine, index = (query @ keys.T).topk(min(KNN["k"], len(keys)))
        near.append(torch.stack([cosine.cpu(), classes[index.cpu()]]))
    cosine, voters = everyone(torch.cat(near, dim=1), dim=2)
    cosine, index = cosine.topk(min(KNN["k"], len(bank)))
    votes = torch.zeros(len(val), len(bank.classes))
    votes.scatter_add_(1, voters.gather(1, index).long(), (cosine / KNN["temperature"]).exp())
    return accuracy(votes, labels)[0].item()


def evaluate(model, bank, val, args):
    """k-NN of a student in pre-training, or top-1 and top-5 of a classifier, in percent."""
    model.eval()
    if args.task == "pretrain":
        result = dict(knn=knn(model.student, bank, val, args))
    else:
        logits, labels = map(everyone, outputs(model, val, args))
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        result = dict(top1=top1.item(), top5=top5.item())
    model.train()
    return result


# --- Checkpoints: what is in --out --------------------------------------------------------------
def write(path, content):
    """torch.save, whole or not at all. UsageError if it fails; the file is then as it was."""
    try:
        with open(f"{path}.part", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, on a full disk
        raise UsageError(f"{path} could not be written, but is as it was: {error}") from error


def owned(out):
    """A lock on the folder `out`, which it makes; it ends with the process at the latest.
    UsageError if another run has it, or it cannot be written."""
    holder = out / f".holder{RANK}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / f".lock{RANK}").acquire(timeout=0)
        holder.write_text(str(os.getpid()))
    except filelock.Timeout as error:
        raise UsageError(f"--out {out} is in use by process {holder.read_text()}") from error
    except OSError as error:
        raise UsageError(f"--out: {error}") from error
    except NotImplementedError:  # by a file system without locks
        return contextlib.nullcontext()
    return lock


def save(out, model, parts, **rest):
    """Write last.pt, the state of all parts (student and align, or a classifier's; optimiser and
    scaler) and the rest (step, log, arguments, classes); and the encoder, and the classifier."""
    write(out / "student.pt", model.student.state_dict())
    if isinstance(model, Classifier):
        write(out / "classifier.pt", model.timm_state())
        (out / "classes.txt").write_bytes(os.fsencode("\n".join(rest["classes"])))
    states = {name: part.state_dict() for name, part in parts.items()}
    write(out / "last.pt", states | rest)


def resume(out, model, parts, init, facts):
    """Load last.pt into the parts -> steps done, log. Rank 0 writes a first one, with the encoder
    of a file `init`, unless there is one. UsageError if it is of another run; only epochs may
    grow."""
    path = out / "last.pt"
    if RANK == 0 and not path.exists():
        if (out / "log.jsonl").exists():
            raise UsageError(f"{out} has a log.jsonl but no last.pt; choose another --out")
        if init:
            print(f"--init {init}: left aside {load_encoder(model.student, init)}")
        save(out, model, parts, step=0, log=[], **facts)
    gather(None)  # the other ranks wait for rank 0's file
    last = read_weights(path)
    new = facts["arguments"]
    old = dict(epochs=0) | last.get("arguments", {})
    old["epochs"] = max(old["epochs"], new["epochs"])
    odd = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    if odd:
        raise UsageError(f"{path} is of a run with other arguments: {', '.join(odd)}. Restore "
                         f"them, or start anew from its encoder: --init {path}, another --out")
    for name, part in parts.items():
        part.load_state_dict(last[name])
    return last["step"], last["log"]


# --- The loop -----------------------------------------------------------------------------------
class Meter:
    """What the steps since the last record left: losses and gradient norms, still on the device,
    and the seconds that it waited for images."""
    def __init__(self):
        self.steps, self.waited, self.since = [], 0.0, time.perf_counter()

    def fetch(self, stream, device):
        """The next micro-batch, on the device. The wait for it counts if CUDA then has nothing left
        to do: the host may be steps ahead."""
        asked = time.perf_counter()
        batch = next(stream)
        if device.type != "cuda" or torch.cuda.current_stream().query():
            self.waited += time.perf_counter() - asked
        return [x.to(device, non_blocking=True) for x in batch]

    def read(self, done, schedule, scaler, data):
        """A line of the log, of the steps up to `done`. Here the host waits for the device.
        UsageError if a loss or norm is not finite: no step was taken with it. In fp16 norms may
        overflow while the scale adapts, until it is below 1; grad_norm is the others' median."""
        steps = torch.stack(self.steps).tolist()
        seconds = time.perf_counter() - self.since
        table = torch.tensor(gather(steps)).permute(1, 2, 0)  # of steps, loss or norm, ranks
        finite = table.isfinite()
        finite[:, 1] |= scaler.get_scale() >= 1
        if not finite.all():
            step, _, rank = (~finite).nonzero()[0].tolist()
            step += done - len(table)
            names = [data.name(index) for _, index in schedule.keys(step, rank)]
            raise UsageError(f"non-finite loss or gradient in step {step + 1}, rank {rank}, lr "
                             f"{schedule.rate(step):.3g}; last.pt is of before; {names}")
        norms = table[:, 1, 0]
        norms = norms[norms.isfinite()]
        return dict(loss=table[:, 0].mean().item(), step=done, epoch=done / schedule.per_epoch,
                    images_per_s=len(table) * schedule.args.batch_size / seconds,
                    data_wait=self.waited / seconds, lr=schedule.rate(done - 1),
                    grad_norm=norms.median().item() if len(norms) else None)


def wrap(model, teacher, args):
    """Model and teacher as the loop calls them: compiled on CUDA or if asked, and in DDP."""
    if args.compile or (args.compile is None and args.device.type == "cuda"):
        # einops remembers a type of tensors at first sight, which would break a trace
        rearrange(next(model.parameters()), "... -> ...")
        model = torch.compile(model)
        teacher = None if teacher is None else torch.compile(teacher)
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, teacher


def loss_of(network, teacher, images, labels, noise, args):
    """Scalar loss of a micro-batch: alignment with the teacher's levels and attention, or
    cross-entropy with the labels. The teacher runs in the precision of its weights."""
    if teacher is None:
        with autocast(args):
            logits = network(images, noise)
        smoothing = 0.1 if args.task == "finetune" else 0.0
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    levels, attention = teacher(images)
    mask_noise, path_noise = noise.tensor_split([attention.shape[1]], dim=1)
    with autocast(args):
        return network(images, levels, attention, mask_noise=mask_noise, path_noise=path_noise)


def announce(args, schedule, done, data, val, teacher):
    """One line on what begins."""
    sees = f"teacher sees {teacher.image_size} in {teacher.grid} patches; " if teacher else ""
    print(f"{args.task}: {len(data)} images of {args.data} in {len(data.classes)} classes, "
          f"{len(val or [])} to evaluate on; {sees}{schedule.steps} steps, from {done}, of "
          f"{args.batch_size} = {WORLD} processes x {schedule.parts} x {schedule.micro}; "
          f"lr {schedule.peak:.2e}; {args.device} {args.amp}"
          f"{'; finished' * (done == schedule.steps)}", flush=True)


def progress(done, steps):
    """The steps to do, with a bar on a terminal, and a line now and then elsewhere."""
    lines = dict(mininterval=30, maxinterval=30, bar_format="{l_bar}{bar}{r_bar}\n")
    if sys.stderr.isatty():
        lines = {}
    return tqdm(range(done, steps), initial=done, total=steps, disable=RANK > 0, **lines)


def train(args):
    """Run one task -> its model, teacher, sources data, bank and val, and record, the last of the
    log. UsageError if it cannot begin or go on."""
    out = Path(args.out)
    with owned(out):
        try:
            return run(args, out)
        except KeyboardInterrupt as stop:
            last = out / "last.pt"
            step = read_weights(last)["step"] if last.exists() else 0
            raise KeyboardInterrupt(f"{last} is of step {step}") from stop


def run(args, out):
    """train(), in a folder `out` that is ours."""
    model, teacher, (data, bank, val) = build(args)
    schedule, mix = Schedule(args, len(data)), mixing(data, args)
    optimiser, scaler = make_optimiser(model, args), make_scaler(args)
    parts = dict(model.named_children(), optimiser=optimiser, scaler=scaler)
    lasting = {name: value for name, value in vars(args).items() if name not in FREE}
    lasting["images in --data"] = len(data)
    facts = dict(classes=data.classes, arguments=lasting)
    done, log = resume(out, model, parts, args.init, facts)
    if RANK == 0:
        announce(args, schedule, done, data, val, teacher)
    network, observe = wrap(model, teacher, args)
    width = 2 * len(model.student.blocks)  # of noise: drop path's, and the mask's
    width += math.prod(model.student.grid) if teacher else 0
    stream, meter = loader(data, schedule.batches(done), args), Meter()
    bar = progress(done, schedule.steps)
    with open(out / "log.jsonl" if RANK == 0 else os.devnull, "w", buffering=1) as sink:
        sink.writelines(json.dumps(record) + "\n" for record in log)
        for step in bar:
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(step) * group["lr_scale"]
            losses = []
            for part, noise in enumerate(schedule.noise(step, width)):
                images, labels = meter.fetch(stream, args.device)
                if mix:
                    torch.default_generator.manual_seed(seed_of(args.seed, "mix", step, RANK, part))
                    images, labels = mix(images / 255, labels)
                final = WORLD == 1 or part + 1 == schedule.parts  # ranks exchange gradients once
                with contextlib.nullcontext() if final else network.no_sync():
                    loss = loss_of(network, observe, images, labels, noise, args)
                    loss = loss * (len(images) / schedule.share)  # the last part may be smaller
                    scaler.scale(poisoned(loss)).backward()
                losses.append(loss.detach())
            scaler.unscale_(optimiser)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            scaler.step(optimiser)  # takes none if a gradient is not finite
            scaler.update()
            optimiser.zero_grad()
            meter.steps.append(torch.stack([torch.stack(losses).sum(), norm]))
            done = step + 1
            saves = done % args.save_every == 0 or done == schedule.steps
            if not saves and done % LOG_EVERY:
                continue
            record = meter.read(done, schedule, scaler, data)
            if val and schedule.evaluates(done - len(meter.steps), done):
                record |= evaluate(model, bank, val, args)
            log.append(record)
            sink.write(json.dumps(record) + "\n")
            bar.set_postfix(record, refresh=False)
            if saves and RANK == 0:
                save(out, model, parts, step=done, log=log, **facts)
            meter = Meter()
    return SimpleNamespace(
        model=model, teacher=teacher, data=data, bank=bank, val=val, record=log[-1])


# --- Entry --------------------------------------------------------------------------------------
def demo(args):
    """A teacher learns the digits with labels, for 0.45 of --epochs, and a student from it without,
    for 0.6, which takes three minutes on two CPU cores. All are rated by k-NN."""
    school, home = f"{args.out}/teacher", f"{args.out}/student"

    def lesson(share, **changes):
        """One run, for a share of --epochs."""
        changes["epochs"] = share * args.epochs
        return train(argparse.Namespace(**vars(args) | changes))
    lesson(0.45, task="finetune", student=args.teacher, out=school)
    run = lesson(0.6, teacher_weights=f"{school}/student.pt", out=home)
    torch.manual_seed(args.seed)
    untrained = vit(args.student, image_size=args.image_size).to(args.device).eval()
    before = knn(untrained, run.bank, run.val, args)
    taught = knn(lambda images: run.teacher(images)[0], run.bank, run.val, args)
    if RANK == 0:
        print(f"{home}/student.pt has seen parts of pictures, and no label. Next: tutorial.ipynb; "
              "--data FOLDER, for pictures of your own; README.md, for ImageNet.\n"
              f"k-NN {KNN}, mean patch token: untrained student {before:.1f} %, "
              f"trained student {run.record['knn']:.1f} %, teacher {taught:.1f} %")


def join_processes(args):
    """Meet the other ranks, if torchrun started this one. UsageError if they started without it."""
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise UsageError("SLURM started several tasks: start one, which starts torchrun")
    elif not dist.is_initialized():
        if args.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun restarts with the old keys
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(store=store, rank=rank, world_size=world)


def main(argv=None):
    """Run a command line. Errors of use and lack of memory are one line and exit 2, Ctrl-C is one
    line and exit 130; any other exception is a bug, or an edit of yours, and is shown whole."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        return  # a loader's worker imports the script that called this; it must not train
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of names that it cannot show
    try:
        args = parse(argv)
        join_processes(args)
        asked = args.task, args.teacher, args.teacher_weights
        digits = args.data.partition(":")[0] == "digits"
        is_demo = digits and asked == ("pretrain", DIGITS["teacher"], "pretrained")
        (demo if is_demo else train)(args)
        if dist.is_initialized():  # after an error it could wait for the others
            dist.destroy_process_group()
    except KeyboardInterrupt as stop:
        fail(f"interrupted: {stop}, from which the same command goes on", 130)
    except UsageError as error:
        fail(str(error).rpartition("UsageError: ")[2])  # a worker puts its traceback before it
    except torch.OutOfMemoryError as error:
        fail(f"lower --micro-batch, now {args.micro_batch}: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fail(f"--out {args.out}: {error}")


def fail(text, code=2):
    """Exit with one line, written at once, so that several ranks' do not mix."""
    sys.stderr.write(f"train.py: error: {' '.join(text.split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
