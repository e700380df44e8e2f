"""Pre-train, fine-tune, probe and evaluate with MaskAlign (maskalign.py).

    python train.py                                                  # demo: digits, no download
    torchrun --nproc_per_node=8 train.py --data /imagenet            # the paper's pre-training
    python train.py --task finetune --init out/student.pt --data /imagenet --out tune   # or probe
    python train.py --task finetune --init tune/classifier.pt --data /v2 --out v2 --epochs 0

task and data:          default; that for digits where it differs
  --task {pretrain,finetune,probe}  pretrain  what is trained: MaskAlign, a classifier, or its head
  --data DIR            digits     train/ and val/ with a folder per class, or any folder of images;
                                   digits: rendered as needed, digits:N: the same N every epoch
  --workers INT         -  0       loader processes per rank; default: its CPUs, at most 16

model:                  default; that for digits where it differs
  --student NAME        vit_base_patch16_224  vit_digits_patch4_32  a size in maskalign.VITS
  --init FILE           -          an encoder to start from, or a classifier of the same classes
  --image-size HxW      -          pixels, or N for NxN; default: the student's own
  --teacher NAME        ViT-B-16-quickgelu  vit_digits_patch4_32  of open_clip, timm, or VITS
  --teacher-weights W   pretrained  or a file, a tag of open_clip, or random (for timing)
  --levels N            5  3       K, the number of the teacher's last blocks that are aligned
  --mask {attentive,random}  attentive  how the visible patches are drawn
  --mask-ratio R        0.7        share of the patches that the student does not see

optimisation:           pretrain  finetune  probe  digits
  --epochs X            200       100       90     1      passes over the data; 0: only evaluate
  --warmup-epochs X     20        5         10     0.1    linear; a cosine follows
  --batch-size N        1024      1024      16384  64     images per optimiser step, of all ranks
  --blr X               1.5e-4    3e-4      0.025  8e-3   peak learning rate per 256 images
  --min-lr X            1e-5      1e-6      0      1e-6   learning rate of the last step
  --weight-decay X      0.05      0.05      0      0.05   of AdamW
  --drop-path P         0.1       0.2       0      0      rate of the last block, linear in depth
  --layer-decay R       1         0.55      1      1      factor of the learning rate per block
  --eval-every X        20        1         1      1      epochs; 0: only at the end

run:                    default
  --out DIR             out        last.pt, student.pt, log.jsonl, look.png, and classifier.pt; the
                                   same command resumes it
  --micro-batch N       256        most images in a forward pass; gradients are accumulated
  --save-every N        1000       optimiser steps
  --seed INT            0          of weights, data and masks
  --amp {bf16,fp16,off}  -         default: the best that the device has
  --device NAME         -          default: cuda if there is one, else cpu
  --[no-]compile                   torch.compile; default: on cuda

Below: command line, ranks and signals, data, schedule, model and optimiser, evaluation,
checkpoints, the loop, entry. A rank is a process, as in torch; the ranks share a step's images.
"""
import argparse
import atexit
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache, lru_cache, partial
from hashlib import sha256
from math import ceil, cos, pi, prod
from pathlib import Path
from random import Random
from time import perf_counter
from types import SimpleNamespace
from unicodedata import normalize

import numpy
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from timm.optim import param_groups_layer_decay
from timm.utils import accuracy
from torch import distributed as dist, multiprocessing, nn
from torch.utils.data import BatchSampler, DataLoader, default_collate
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

from maskalign import (
    MaskAlign, UsageError, load_encoder, load_teacher, read_weights, vit, whiten)

# what torchrun says of this process
RANK, LOCAL_RANK = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK"))
WORLD, LOCAL_WORLD = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
# on Linux a process may use fewer CPUs than there are
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LOG_EVERY = 10  # optimiser steps; in between the loop never waits for the GPU (a probe's SGD does)
PRECISIONS = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)
FREE = {"out", "data", "init", "workers", "device", "compile", "micro_batch", "save_every",
        "eval_every"}  # arguments that may differ when a run is resumed


# --- Command line: options and their defaults are those of the docstring ------------------------
def between(kind, lowest, highest=2 ** 31):
    """A type for argparse, whose name is in its messages: numbers from lowest to highest."""
    def number(text):
        if not lowest <= kind(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not between {lowest} and {highest}")
        return kind(text)
    return number


def image_size(text):
    """A type for argparse: "N" or "HxW" -> (height, width) in pixels."""
    sides = list(map(between(int, 1), text.split("x", 1)))
    return sides[0], sides[-1]


TYPES = dict(N=between(int, 1), INT=between(int, 0), X=between(float, 0), R=between(float, 0, 1),
             P=between(float, 0, 0.99), HxW=image_size)


def read_options(argv, column):
    """A command line -> its arguments, with the defaults of a column of the docstring. Exits as
    argparse does if one is invalid."""
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS)
    parser.format_help = lambda: __doc__
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    for line in re.findall("^  (--[a-z].+)", __doc__, re.M):
        words, *row, _ = re.split("  +", line)
        flag, metavar = words.split()
        choices = metavar[1:-1].split(",") if metavar[0] == "{" else None
        # 4 defaults: of each task, of digits; 2: of all tasks, of digits; 1: of all
        default = row[column if len(row) == 4 else min(column, 0)]
        parser.add_argument(
            flag,
            type=TYPES.get(metavar, str),
            choices=choices,
            default=None if default == "-" else default)
    return parser.parse_args(argv)


def parse(argv):
    """A command line -> all arguments, with the task's defaults, or, last, those for digits. Raises
    UsageError if they do not fit together; exits as argparse does if one is invalid."""
    first = read_options(argv, 0)
    tasks = "pretrain", "finetune", "probe"
    digits = re.match("digits(:|$)", first.data)
    args = read_options(argv, -1 if digits else tasks.index(first.task))
    for name, value in vars(args).items():
        if value == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty")
    if args.epochs and args.warmup_epochs > max(args.epochs, 0.1):  # 0.1: the demo may be cut short
        raise UsageError(f"--warmup-epochs {args.warmup_epochs:g} exceed --epochs {args.epochs:g}")
    if args.batch_size % WORLD:
        raise UsageError(f"--batch-size {args.batch_size} is not divisible by {WORLD} ranks")
    if args.workers is None:
        args.workers = max(1, min(16, CPUS // LOCAL_WORLD))
    choose_device(args)
    return args


def choose_device(args):
    """Set args.device and args.amp. Raises UsageError if there is no such device."""
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        args.device = torch.device(args.device or best)
        if args.device.type == "cuda":  # before anything opens a context on GPU 0
            torch.cuda.set_device(args.device.index or LOCAL_RANK)
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"--device {args.device}: {error}") from error
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.amp = args.amp or (half if args.device.type == "cuda" else "off")


# --- Ranks and signals --------------------------------------------------------------------------
SIGNALS = {signum for signum in signal.Signals if signum.name in ("SIGTERM", "SIGUSR1", "SIGINT")}
# unsaved: a step was taken that is not in last.pt
stop = SimpleNamespace(signal=0, unsaved=False, saved="nothing was trained yet")


def on_signal(signum, frame):
    """End at once if every step is saved, as in an evaluation, or at a second Ctrl-C; else the loop
    saves first, at the end of the step or, with several ranks, of LOG_EVERY steps at most."""
    insists = signum == stop.signal == signal.SIGINT
    stop.signal = signum
    if insists or not stop.unsaved:
        leave(signum)


def leave(signum):
    """End the process here, with 128 + the signal."""
    if RANK == 0:
        os.write(2, os.fsencode(f"\ntrain.py: {stop.saved}; the same command resumes there\n"))
    os._exit(128 + signum)


def ignore_signals(worker):
    """In a loader's worker: SLURM and terminals signal workers too; only ranks respond."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kill the workers of a run that failed: they ignore multiprocessing's SIGTERM, after which its
    exit would wait for them for ever."""
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def gather(mine):
    """Any object -> every rank's, by rank; all wait for the last."""
    ranks = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(ranks, mine)
    return ranks


def everyone(rows, dim=0):
    """Every rank's rows, tensors [m,…] -> all of them, on the CPU."""
    return torch.cat(gather(rows.cpu()), dim)


def progress(items, **more):
    """tqdm on rank 0: a bar on a terminal, a line every 30 s elsewhere."""
    if not sys.stderr.isatty():
        more |= dict(mininterval=30, maxinterval=30, bar_format="{l_bar}{bar}{r_bar}\n")
    return tqdm(items, disable=RANK > 0, **more)


def say(text):
    """Print a line, on rank 0."""
    if RANK == 0:
        print(text, flush=True)


# --- Data: an image depends on (seed, epoch, index) alone ---------------------------------------
EXTENSIONS = tuple(".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
DIGITS = re.compile(r"digits(?::([1-9]\d{0,8}))?").fullmatch  # --data -> match or None
# Pillow limits a PNG's text and colour profile to 1 MB: raised; its limit of the pixels stays
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def seed_of(*key):
    """Any key -> a 60-bit seed, the same on every machine."""
    return int(sha256(repr(key).encode()).hexdigest()[:15], 16)


# Pillow's own, by size; outside Digits, because fonts cannot be pickled
font = cache(ImageFont.load_default)


class Source:
    """Images of `classes` and a `size` (H, W): source[keys], of a micro-batch of keys (epoch,
    index), -> images uint8 [b,3,H,W], labels [b]; name(index) is for messages."""
    def __len__(self):
        return self.count

    def __getitem__(self, keys):
        return default_collate([self.read(*key) for key in keys])


class Digits(Source):
    """`count` digits of random place, size, angle and colours, the same in every epoch if
    `fixed`."""
    classes = list("0123456789")
    name = int

    def __init__(self, count, size, seed, fixed):
        self.count, self.size, self.seed, self.fixed = count, size, seed, fixed

    def read(self, epoch, index):
        """An image uint8 [3,H,W] and its label."""
        draw = Random(seed_of(self.seed, not self.fixed and epoch, index))
        height, width = self.size
        glyph = Image.new("L", (width, height))
        place = width * draw.uniform(0.35, 0.65), height * draw.uniform(0.35, 0.65)
        size = height * draw.choice((0.55, 0.7, 0.85, 1))
        ImageDraw.Draw(glyph).text(place, str(index % 10), 255, font(size), "mm")
        ground = Image.frombytes("RGB", (4, 4), bytes(draw.choices(range(39), k=48)))
        image = ground.resize(glyph.size, Image.BILINEAR)
        ink = tuple(draw.choices(range(204, 256), k=3))
        image.paste(ink, mask=glyph.rotate(draw.uniform(-30, 30), Image.BILINEAR))
        return v2.functional.pil_to_tensor(image), index % 10


def as_seen(image):
    """A Pillow image -> RGB as a viewer shows it: upright, on white, deep grey in its range."""
    with suppress(Exception):  # it may fail on a malformed tag, but only after rotating
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 bits, or floats, whose white is the brightest
        white = (image.getextrema()[1] or 1) if image.mode == "F" else 65535
        image = image.convert("F").point(lambda x: x * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def augmentation(task, size):
    """A task's random crops and more, or just the centre: a Pillow image -> uint8 [3,H,W]."""
    if task is None:  # 7/8 of the shorter side, cut out before it is resized
        fit = partial(ImageOps.fit, size=size[::-1], method=Image.BICUBIC, bleed=1 / 16)
        return v2.Compose([fit, v2.PILToTensor()])
    aspect = size[1] / size[0]
    # Deviation: crops are resized, turned and erased as uint8 tensors by torchvision: turned
    # bilinearly, erased with ImageNet's mean colour, where MAE's are bicubic, with noise.
    crop = v2.RandomResizedCrop(
        size,
        scale=(0.2 if task == "pretrain" else 0.08, 1.0),
        ratio=(3 / 4 * aspect, 4 / 3 * aspect),
        interpolation=Image.BICUBIC)
    steps = [v2.PILToTensor(), crop, v2.RandomHorizontalFlip()]
    if task == "finetune":
        mean = 124, 116, 104
        steps += [v2.RandAugment(2, 9, interpolation=Image.BILINEAR, fill=mean),
                  v2.RandomErasing(0.25, value=mean)]
    return v2.Compose(steps)


class Folder(Source):
    """Images {file: class} in a folder, augmented for a task or, without one, centred. Names are an
    array, which forked workers share: each would end up with a copy of a list. They count bad files
    together."""
    def __init__(self, root, classes, size, files, seed, task=None):
        self.count, self.classes, self.size, self.seed = len(files), classes, size, seed
        self.augment = augmentation(task, size)
        self.names = numpy.array([os.fsencode(os.path.join(root, file)) for file in files])
        self.labels = numpy.searchsorted(classes or [""], list(files.values()))
        self.bad = torch.zeros(self.count, dtype=torch.bool).share_memory_()

    def name(self, index):
        """A file, by its number."""
        return os.fsdecode(self.names[index])

    def read(self, epoch, index):
        """An image uint8 [3,H,W] and its label; the next readable one's if it cannot be read, which
        is reported once. Raises UsageError if more than ten and more than 1 % of all cannot."""
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
            if bad == self.count or bad > max(10, self.count // 100):
                raise UsageError(f"{bad} of {self.count} files are unreadable, the last {name}")
            index = (index + 1) % self.count


def scan(root):
    """The images in a folder and below, sorted, as paths from there with "/" between folders.
    Hidden entries, as .ipynb_checkpoints and a Mac's ._x.jpg and __MACOSX, are skipped."""
    found = set()
    for at, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        at = Path(os.path.relpath(at, root))
        found |= {(at / name).as_posix() for name in names if not name.startswith(".")}
    images = {file for file in found if file.lower().endswith(EXTENSIONS)}
    if others := sorted({Path(file).suffix for file in found - images}):
        print(f"--data: {len(found) - len(images)} files of other kinds are not read: {others[:9]}")
    return sorted(images)


def open_data(args, size):
    """--data, at size (H, W) -> sources: to train on, k-NN's bank of neighbours, and the labelled
    one to evaluate on, or None. Raises UsageError without images, or if val's classes are not
    train's."""
    if digits := DIGITS(args.data):
        count = int(digits[1] or 76800)
        data = Digits(count, size, seed_of(args.seed, "train"), fixed=bool(digits[1]))
        bank = Digits(2000, size, seed_of(args.seed, "bank"), fixed=True)
        val = Digits(1000, size, seed_of("val"), fixed=True)
        return data, bank, val
    box = [scan(args.data) if RANK == 0 else None]
    if WORLD > 1:  # a network disk may show each rank another folder
        dist.broadcast_object_list(box)
    # é is one letter, whether a file system writes one character or, as a Mac's, two
    train, val = ({file: normalize("NFC", file.split("/")[1]) for file in box[0]
                   if re.match(f"{split}/.+/", file)} for split in ("train", "val"))
    classes = sorted(set(train.values()))
    odd = sorted(set(val.values()) - set(classes))
    if not classes:  # nor labels
        train, val = {file: "" for file in box[0] if not file.startswith("val/")}, {}
    elif odd or (not val and Path(args.data, "val").exists()):
        raise UsageError("--data: val has no class folders with images, or others than train: "
                         f"{odd[:3]}")
    if not train:
        raise UsageError(f"--data: there is no such folder, or no image in it: {args.data}")
    of = partial(Folder, args.data, classes, size)
    return of(train, args.seed, args.task), of(train, 0), of(val, 0) if val else None


def loader(source, batches, args):
    """Yields source[keys] for each list of keys in batches, from worker processes. Raises
    UsageError if what they hold ready exceeds shared memory, for which they would wait for ever."""
    held = 2 * args.workers * LOCAL_WORLD * args.micro_batch * 3 * prod(source.size)
    memory = "/dev/shm"
    if os.path.isdir(memory) and held > shutil.disk_usage(memory).free:
        raise UsageError(f"workers need {held >> 20} MiB of {memory}: lower --workers or "
                         "--micro-batch, or give a container more (docker run --shm-size)")
    if len(tempfile.gettempdir()) > 60:  # workers' sockets need a shorter path
        tempfile.tempdir = "/tmp"
    # forked workers start at once, share the source, and end with their rank, even a killed one
    fork = "fork" if args.workers and sys.platform == "linux" else None
    yield from DataLoader(
        source,
        batch_size=None,
        sampler=batches,
        num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
        multiprocessing_context=fork,
        worker_init_fn=ignore_signals)


def mixing(data, args):
    """Fine-tuning's mixup or cutmix, or None. Deviation: of the images of a micro-batch."""
    if args.task == "finetune" and isinstance(data, Folder):
        classes = len(data.classes)
        return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                                v2.CutMix(num_classes=classes)])


# --- Schedule: what belongs to a step -----------------------------------------------------------
@lru_cache(maxsize=2)
def order(count, seed, epoch):
    """The order of an epoch's images: a permutation of range(count)."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


class Schedule:
    """Rate, images and noise of a step, by (seed, step) alone, at any number of ranks: a run can be
    cut anywhere and resumed. A rank has `share` images of a step, in `parts` of at most `micro`."""
    def __init__(self, args, count):
        self.seed, self.device = args.seed, args.device
        self.batch, self.count = args.batch_size, count
        epoch = count / args.batch_size  # in steps; 1e-6 absorbs floats' rounding
        self.steps = max(1, int(args.epochs * epoch + 1e-6))
        self.warmup = int(args.warmup_epochs * epoch + 1e-6)
        # steps between evaluations; 0: only at the end
        self.every = args.eval_every * epoch * (1 - 1e-6) or self.steps
        self.peak, self.lowest = args.blr * args.batch_size / 256, args.min_lr
        self.share = args.batch_size // WORLD
        self.parts = ceil(self.share / args.micro_batch)
        self.micro = ceil(self.share / self.parts)
        # would the last part hold one image?
        if args.task == "probe" and self.share == 1 + self.micro * (self.parts - 1):
            raise UsageError("a probe's BatchNorm needs two images in every micro-batch: change "
                             "--batch-size or --micro-batch")

    def rate(self, step):
        """Learning rate: linear warm-up to the peak, then a cosine that ends at the lowest."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step + 1 - self.warmup) / (self.steps - self.warmup)
        return self.lowest + (self.peak - self.lowest) * (1 + cos(pi * progress)) / 2

    def evaluates(self, last, done):
        """Whether an evaluation is due at step `done` if the last one was at step `last`."""
        return done // self.every > last // self.every or done == self.steps > last

    def keys(self, step, rank):
        """The (epoch, index) of a rank's images."""
        first = step * self.batch + rank * self.share
        places = [divmod(at, self.count) for at in range(first, first + self.share)]
        return [(epoch, order(self.count, self.seed, epoch)[at]) for epoch, at in places]

    def batches(self, done):
        """The keys of this rank's micro-batches, from step `done` on."""
        for step in range(done, self.steps):
            yield from BatchSampler(self.keys(step, RANK), self.micro, drop_last=False)

    def noise(self, step, width):
        """Uniform noise [b,width] for each micro-batch of this rank: its rows of the whole batch's,
        so that an image's noise does not depend on the number of ranks."""
        generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, "step", step))
        noise = torch.rand(WORLD, self.share, width, generator=generator, device=self.device)
        return noise[RANK].split(self.micro)


# --- Model, precision and optimiser -------------------------------------------------------------
class Classifier(nn.Module):
    """Images [B,3,H,W] -> logits [B,classes], from the mean patch token, normed. A probe trains the
    head alone. Names are those of timm's models with global_pool="avg"."""
    def __init__(self, student, classes, probe):
        super().__init__()
        # fine-tuning trains the positions, too, as MAE's does
        self.student = student.requires_grad_(not probe)
        student.norm.requires_grad_(False)
        self.fc_norm = (nn.BatchNorm1d(student.dim, affine=False) if probe else
                        nn.LayerNorm(student.dim, eps=1e-6))
        self.head = nn.Linear(student.dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)

    def timm_state(self):
        """What timm.create_model(name, num_classes=C, global_pool="avg") loads strictly; but a
        probe's fc_norm is a BatchNorm."""
        return {name.removeprefix("student."): x.cpu() for name, x in self.state_dict().items()
                if not name.startswith("student.norm.")}

    def forward(self, images, path_noise=None):
        tokens = self.student(images, path_noise=path_noise)[-1]
        return self.head(self.fc_norm(tokens[:, 1:].mean(dim=1)))


def build(args):
    """The task's model, teacher or None, and sources; to evaluate what was pre-trained, the student
    alone. Raises UsageError if they do not fit together."""
    torch.manual_seed(args.seed)
    student = vit(args.student, drop_path=args.drop_path, image_size=args.image_size)
    teacher = None
    sources = open_data(args, student.image_size)
    classes = sources[0].classes
    if args.task != "pretrain":
        if len(classes) < 2:
            raise UsageError(f"--task {args.task} needs two class folders or more, not {classes}")
        model = Classifier(student, len(classes), args.task == "probe")
    elif not args.epochs:
        model = nn.ModuleDict(dict(student=student))
    else:
        weights = None if args.teacher_weights == "random" else args.teacher_weights
        teacher = load_teacher(args.teacher, weights, args.levels, student.grid).to(
            args.device, PRECISIONS[args.amp])
        model = MaskAlign(student, teacher, args.mask, args.mask_ratio)
    return model.to(args.device), teacher, sources


def make_optimiser(model, args):
    """AdamW, or SGD for a probe. Block l of S learns at layer_decay^(S+1-l) times the head's rate.
    1-D parameters and align.matrix are not decayed."""
    tuned = isinstance(model, Classifier)
    # Deviation: fine-tuning decays neither positions nor [CLS], as MAE's does not.
    exempt = ["student.cls_token", "student.pos_embed"] if tuned else ["align.matrix"]
    # timm's form: patterns of the stem, of block (\d+), and, "", of the rest, which comes last
    model.group_matcher = lambda coarse: dict(
        stem=r"student\.[^b]", blocks=[(r"student\.blocks\.(\d+)", None), ("", (99,))])
    groups = param_groups_layer_decay(
        model, args.weight_decay, exempt, layer_decay=args.layer_decay)
    if args.task != "probe":
        betas = (0.9, 0.999 if tuned else 0.95)
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    # Deviation: not LARS. Not fused, which fails if fp16 skips the first step.
    return torch.optim.SGD(groups, momentum=0.9)


def make_scaler(args):
    """fp16's gradient scaler. In bf16 and fp32 it only skips steps whose gradient is not finite,
    without a wait for the device. Meter.read takes a scale below 1 for an error: here it starts at
    1, so one skip is enough; fp16's starts at 65536, and adapts by a few skips."""
    options = {} if args.amp == "fp16" else dict(init_scale=1.0, growth_interval=2 ** 31 - 1)
    return torch.amp.GradScaler(args.device.type, **options)


def autocast(args):
    """The precision --amp, as a context for what is trained and evaluated."""
    return torch.autocast(args.device.type, PRECISIONS[args.amp], enabled=args.amp != "off")


def wrap(model, teacher, args):
    """Model and teacher as the loop calls them: compiled on CUDA or if asked, and in DDP."""
    if args.compile or (args.compile is None and args.device.type == "cuda"):
        # einops caches a type of tensors at first use, which would break the graph
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


# --- Evaluation: the ranks share the images -----------------------------------------------------
@torch.no_grad()
def outputs(function, source, args, most=2 ** 31):
    """function(images) and labels of this rank's images of a source, [m,…] and [m]; of at most
    `most` images, evenly spaced."""
    chosen = range(0, len(source), ceil(len(source) / most))
    # a rank that has none of them does the first, and leaves it out of its rows
    own = chosen[RANK::WORLD]
    keys = [(0, index) for index in own or chosen[:1]]
    batches = BatchSampler(keys, args.micro_batch, drop_last=False)
    stream = progress(loader(source, batches, args), total=len(batches), delay=20, leave=False)
    with autocast(args):  # labels are cloned: as they come, each holds a file of shared memory open
        rows = [(function(images.to(args.device)).float(), labels.clone())
                for images, labels in stream]
    return [torch.cat(column)[:len(own)] for column in zip(*rows)]


def feature_of(encoder):
    """An encoder, images -> levels, as a function of images to features [B,C], by which neighbours
    are found: the whitened mean patch token of the last level, L2-normalised."""
    def feature(images):
        patches = encoder(images)[-1][:, 1:]
        return F.normalize(whiten(patches.mean(dim=1)), dim=1)
    return feature


def knn(encoder, bank, val, args):
    """k-NN accuracy on val in percent, k 20, by cosine, temperature 0.07. Each rank keeps its share
    of the bank, and only its nearest k are exchanged."""
    keys, classes = outputs(feature_of(encoder), bank, args)
    queries, labels = map(everyone, outputs(feature_of(encoder), val, args))
    near = [(query @ keys.T).topk(min(20, len(keys)))
            for query in queries.to(args.device).split(args.micro_batch)]
    cosine, index = [torch.cat(column).cpu() for column in zip(*near)]
    cosine, voters = everyone(cosine, dim=1), everyone(classes[index], dim=1)
    cosine, index = cosine.topk(min(20, len(bank)))
    votes = torch.zeros(len(val), len(bank.classes))
    votes.scatter_add_(1, voters.gather(1, index), (cosine / 0.07).exp())
    return accuracy(votes, labels)[0].item()


def mutual_knn(encoder, teacher, source, args):
    """Of an image's 20 nearest neighbours among up to 2000 images, the percentage that are also
    among its 20 nearest for the teacher (Huh et al. 2024, arXiv 2405.07987); needs no labels."""
    near = []  # [M,20] each
    for network in (encoder, lambda images: teacher(images)[0]):
        x = everyone(outputs(feature_of(network), source, args, most=2000)[0])
        near.append((x @ x.T).fill_diagonal_(-2).topk(min(20, len(x) - 1)).indices)
    mine, theirs = near
    shared = (mine[:, :, None] == theirs[:, None]).any(dim=2).float().mean()
    return 100 * shared.nan_to_num().item()  # of one image: 0


def components(tokens, like=None):
    """Tokens [B,N,C] -> the first three principal components [B,N,3] of their whitened values, of
    variance 1; the signs are those that agree with `like`, another [B,N,3]."""
    x = whiten(tokens).flatten(0, 1)
    # left singular vectors are the components, of length 1
    x = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).U[:, :3] * (len(x) - 1) ** 0.5
    x = x.unflatten(0, tokens.shape[:2])
    return x if like is None else x * (x * like).mean(dim=(0, 1)).sign()


@torch.no_grad()
def look(model, teacher, images):
    """A MaskAlign, its Teacher, images uint8 [B,3,H,W] -> pictures [5·B,3,H,W] in [0,1]: images,
    the teacher's attention, what the student sees, and the principal components of the student's
    tokens and of the teacher's."""
    levels, attention = teacher(images)
    keep = model.draw(attention)
    theirs = components(levels[-1][:, 1:])
    mine = components(model.student(images)[-1][:, 1:], like=theirs)
    light = repeat(attention / attention.amax(dim=1, keepdim=True), "b n -> b n c", c=3)
    seen = torch.zeros_like(light).scatter(1, repeat(keep, "b v -> b v c", c=3), 1)
    rows = torch.cat([light, seen, 0.5 + mine / 4, 0.5 + theirs / 4]).clamp(0, 1)
    rows = rearrange(rows, "b (h w) c -> b c h w", h=model.student.grid[0])
    light, seen, mine, theirs = F.interpolate(rows, images.shape[-2:]).chunk(4)
    return torch.cat([images / 255, light, seen * images / 255, mine, theirs])


def evaluate(model, teacher, sources, args):
    """The results in percent: a classifier's top-1 and top-5; a student's k-NN, where there are
    labels, and its mutual k-NN with a teacher, where there is one, which also draws look.png."""
    _, bank, val = sources
    model.eval()
    result = {}
    if val and isinstance(model, Classifier):
        top1, top5 = accuracy(*map(everyone, outputs(model, val, args)), topk=(1, 5))
        result = dict(top1=top1.item(), top5=top5.item())
    elif val:
        result["knn"] = knn(model.student, bank, val, args)
    if teacher:
        result["mutual_knn"] = mutual_knn(model.student, teacher, bank, args)
    if teacher and RANK == 0:
        shown = val or bank
        spread = [(0, i * (len(shown) - 1) // 7) for i in range(8)]
        images, _ = shown[spread]
        with spared(Path(args.out, "look.png")) as path, autocast(args):
            save_image(look(model, teacher, images.to(args.device)), path, nrow=8)
    model.train()
    return result


# --- Checkpoints: what is in --out --------------------------------------------------------------
def write(path, content):
    """torch.save, whole or not at all. Raises UsageError if it fails; the file is then as it
    was."""
    try:
        with open(f"{path}.part", "wb") as file:
            torch.save(content, file)  # flushes
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, on a full disk
        raise UsageError(f"{path} could not be written, but is as it was: {error}") from error


@contextmanager
def spared(path):
    """Around the writing of a file not worth stopping the run for: an error is reported once."""
    try:
        yield path
    except OSError as error:
        warnings.warn(f"{path} was not written, the run goes on: {error}")


def note(out, records, mode="a"):
    """Rank 0 appends records to log.jsonl, a line for each."""
    if RANK == 0:
        with spared(out / "log.jsonl") as path, open(path, mode) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def owned(out):
    """A lock on the folder `out`, which it makes; it ends with the process at the latest. Raises
    UsageError if another run has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FileLock(out / f".lock{RANK}").acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"--out {out} is in use by another run: {error}") from error
    except (OSError, NotImplementedError):  # no locks here; or nothing can be written: see write
        return nullcontext()


def save(out, model, stateful, state):
    """Rank 0 writes last.pt, the state of what is stateful (student and align, or a classifier's
    modules; optimiser, scaler) and of the run (step, log, arguments, ...); and the encoder, and the
    classifier. Then the process ends if a signal to any rank asked for it."""
    if RANK == 0:
        write(out / "student.pt", {name: x.cpu() for name, x in model.student.state_dict().items()})
        if isinstance(model, Classifier):
            write(out / "classifier.pt", model.timm_state())
            (out / "classes.txt").write_bytes(os.fsencode("\n".join(state["classes"])))
        states = {name: part.state_dict() for name, part in stateful.items()}
        write(out / "last.pt", states | state)
    # the other ranks wait for the files; a signal that comes later is for the next call
    signum = max(gather(stop.signal))
    stop.unsaved, stop.saved = False, f"{out}/last.pt is of step {state['step']}"
    if signum:
        leave(signum)


def load_start(model, source, classes):
    """Load the encoder of --init; and a classifier's head, if it is of the same kind and, by the
    classes.txt beside it, of the same classes -> whether it was. Raises as load_encoder does."""
    aside, source = load_encoder(model.student, source), Path(source)
    if source.name == "last.pt":
        source = source.with_name("classifier.pt")
    names, state = source.with_name("classes.txt"), {}
    if names.exists() and names.read_bytes() == os.fsencode("\n".join(classes)):
        state = read_weights(source)
    taken = isinstance(model, Classifier) and state.keys() == model.timm_state().keys()
    if taken:
        model.load_state_dict(state, strict=False)  # fc_norm and head; the encoder's names differ
    say(f"--init {source}: {'its head is used' if taken else f'left aside {aside}'}")
    return taken


def resume(out, model, stateful, args, data):
    """Load last.pt into what is stateful -> the run's state: step, step last evaluated, log,
    classes, arguments. Rank 0 writes a first one, with what --init has, unless there is one. Raises
    UsageError if it is of another run; only epochs may grow."""
    path = out / "last.pt"
    new = {name: value for name, value in vars(args).items() if name not in FREE}
    new["teacher_weights"] = os.path.basename(args.teacher_weights)  # a file may be moved
    new["images in --data"] = len(data)
    state = dict(step=0, evaluated=0, log=[], classes=data.classes, arguments=new)
    if not gather(RANK == 0 and path.exists())[0]:  # a network disk may remember what was missing
        if (out / "log.jsonl").exists():
            raise UsageError(f"{out} has a log.jsonl but no last.pt; choose another --out")
        if args.init and RANK == 0:
            load_start(model, args.init, data.classes)
        save(out, model, stateful, state)
    last = read_weights(path)
    old = dict(epochs=0) | last.get("arguments", {})
    old["epochs"] = max(old["epochs"], args.epochs)
    odd = [f"{name} {old.get(name)} -> {x}" for name, x in new.items() if old.get(name) != x]
    if odd:
        raise UsageError(f"{path} is of a run with other arguments: {', '.join(odd)}. Restore "
                         f"them, or start anew from its encoder: --init {path}, another --out")
    for name, part in stateful.items():
        part.load_state_dict(last[name])
    stop.saved = f"{path} is of step {last['step']}"
    return state | {name: last[name] for name in ("step", "evaluated", "log")}


# --- The loop -----------------------------------------------------------------------------------
class Meter:
    """Losses and gradient norms of the steps since the last record, still on the device,
    and the seconds that it waited for images."""
    def __init__(self):
        self.steps, self.waited, self.since = [], 0.0, perf_counter()

    def fetch(self, stream, device):
        """The next micro-batch, on the device. The wait for it counts if CUDA then has nothing left
        to do: the host may be steps ahead."""
        asked = perf_counter()
        batch = next(stream)
        if device.type != "cuda" or torch.cuda.current_stream().query():
            self.waited += perf_counter() - asked
        return [x.to(device, non_blocking=True) for x in batch]

    def read(self, done, schedule, scaler, data):
        """A line of the log, of the steps up to `done`. Here the host waits for the device. Raises
        UsageError if a loss or norm is not finite: no step was taken with it. But in fp16 norms may
        be infinite while the scale adapts (make_scaler); grad_norm is the others' median."""
        steps = torch.stack(self.steps).tolist()
        seconds = perf_counter() - self.since
        table = torch.tensor(gather(steps)).permute(1, 2, 0)  # of steps, loss or norm, ranks
        finite = table.isfinite()
        finite[:, 1] |= scaler.get_scale() >= 1
        if not finite.all():  # the loss first: its rank is at fault, norms are equal on all ranks
            step, _, rank = (~finite).nonzero()[0].tolist()
            step += done - len(table)
            names = [data.name(index) for _, index in schedule.keys(step, rank)]
            raise UsageError(f"non-finite loss or gradient in step {step + 1}, rank {rank}, lr "
                             f"{schedule.rate(step):.3g}; {stop.saved}; {names}")
        images, norms = len(table) * schedule.batch, table[:, 1, 0]
        norms = norms[norms.isfinite()]
        return dict(
            loss=table[:, 0].mean().item(),
            step=done,
            epoch=done * schedule.batch / len(data),
            images_per_s=images / seconds,
            data_wait=self.waited / seconds,
            lr=schedule.rate(done - 1),
            grad_norm=norms.median().item() if len(norms) else None)


def announce(args, schedule, done, sources):
    """One line on what begins."""
    data, _, val = sources
    say(f"{args.task}: {len(data)} images of {args.data} in {len(data.classes)} classes, "
        f"{len(val or [])} to evaluate on; {schedule.steps} steps, from {done}, of "
        f"{args.batch_size} = {WORLD} processes x {schedule.parts} x {schedule.micro}; "
        f"{args.device} {args.amp}{'; finished' * (done == schedule.steps)}")


def train(args):
    """Run one task -> its model, teacher, sources and record, the last of the log. Raises
    UsageError if it cannot begin or be resumed."""
    out = Path(args.out)
    with owned(out):
        return run(args, out) if args.epochs else score(args, out)


def run(args, out):
    """train(), in a folder `out` on which we hold the lock."""
    model, teacher, sources = build(args)
    data = sources[0]
    schedule, mix = Schedule(args, len(data)), mixing(data, args)
    optimiser, scaler = make_optimiser(model, args), make_scaler(args)
    stateful = dict(model.named_children(), optimiser=optimiser, scaler=scaler)
    state = resume(out, model, stateful, args, data)
    first, log = state["step"], state["log"]

    def report():
        """Log the last record; first evaluate what was saved, if due. A signal in an evaluation
        ends the process at once: the resumed run evaluates."""
        if schedule.evaluates(state["evaluated"], state["step"]):
            log[-1] |= evaluate(model, teacher, sources, args)
            state["evaluated"] = state["step"]
            save(out, model, stateful, state)
        note(out, log[-1:])
    announce(args, schedule, first, sources)
    note(out, log[:-1], "w")
    report()
    wrapped, observe = wrap(model, teacher, args)
    # of the noise: the mask's, and drop path's for two branches a block
    width = (prod(model.student.grid) if teacher else 0) + 2 * len(model.student.blocks)
    stream, meter = loader(data, schedule.batches(first), args), Meter()
    bar = progress(range(first, schedule.steps), initial=first, total=schedule.steps)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step) * group["lr_scale"]
        losses = []
        for part, noise in enumerate(schedule.noise(step, width)):  # for each micro-batch
            images, labels = meter.fetch(stream, args.device)
            if mix:
                torch.default_generator.manual_seed(seed_of(args.seed, "mix", step, RANK, part))
                images, labels = mix(images / 255, labels)
            # read by DDP: ranks exchange gradients once a step
            wrapped.require_backward_grad_sync = part + 1 == schedule.parts
            loss = loss_of(wrapped, observe, images, labels, noise, args)
            loss = loss * (len(images) / schedule.share)  # the last part may be smaller
            # 0·inf = NaN: a loss that is not finite makes all ranks' gradients NaN, and all skip
            scaler.scale(loss * (1 + 0 * loss.detach())).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimiser)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        stop.unsaved = True
        scaler.step(optimiser)  # takes none if a gradient is not finite
        scaler.update()
        optimiser.zero_grad()
        meter.steps.append(torch.stack([sum(losses), norm]))
        done = state["step"] = step + 1
        saves = done % args.save_every == 0 or done == schedule.steps
        if saves or done % LOG_EVERY == 0 or (stop.signal and WORLD == 1):
            log.append(meter.read(done, schedule, scaler, data))
            saves |= schedule.evaluates(state["evaluated"], done)
            if saves or max(gather(stop.signal)):
                save(out, model, stateful, state)
            report()
            bar.set_postfix(log[-1], refresh=False)
            meter = Meter()
    return SimpleNamespace(model=model, teacher=teacher, sources=sources, record=log[-1])


def score(args, out):
    """Evaluate --init, or else last.pt, without training: a line, and one in the log."""
    model, _, sources = build(args)
    data, _, val = sources
    source = args.init or out / "last.pt"
    taken = load_start(model, source, data.classes)
    if not val:
        raise UsageError("--epochs 0: --data has no val/ with class folders to evaluate on")
    if not taken and args.task != "pretrain":
        raise UsageError(f"--epochs 0: {source} has no head for the classes of --data")
    record = dict(step=0, epoch=0.0, init=str(source)) | evaluate(model, None, sources, args)
    note(out, [record])
    say(f"{args.task}: {len(val)} images of {args.data}: {record}")


# --- Entry --------------------------------------------------------------------------------------
def demo(args):
    """A teacher is trained on digits with labels, for 0.45 of --epochs; then a student without, for
    0.6. Three to four minutes on two CPU cores. All are evaluated by k-NN."""
    def lesson(epochs, **changes):
        return train(argparse.Namespace(**vars(args) | changes | dict(epochs=epochs * args.epochs)))
    school, home = f"{args.out}/teacher", f"{args.out}/student"
    lesson(0.45, task="finetune", student=args.teacher, init=None, out=school)
    run = lesson(0.6, teacher_weights=f"{school}/student.pt", out=home)
    torch.manual_seed(args.seed)
    untrained = vit(args.student, image_size=args.image_size).to(args.device).eval()
    _, bank, val = run.sources
    before = knn(untrained, bank, val, args)
    alike = mutual_knn(untrained, run.teacher, bank, args)
    taught = knn(lambda images: run.teacher(images)[0], bank, val, args)
    say(f"{home}/student.pt has seen parts of pictures, and no label; {home}/look.png shows them. "
        "Next: tutorial.ipynb; --data FOLDER, for pictures of your own; README.md, for ImageNet.\n"
        f"mutual k-NN with the teacher: untrained student {alike:.1f} %, trained student "
        f"{run.record['mutual_knn']:.1f} %\nk-NN, k 20, temperature 0.07, mean patch token: "
        f"untrained student {before:.1f} %, trained student {run.record['knn']:.1f} %, "
        f"teacher {taught:.1f} %")


def join_processes(backend):
    """Meet the other ranks, if there are any. Raises UsageError if a variable of torchrun's is not
    set."""
    if WORLD == 1 and RANK == 0:
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            raise UsageError("SLURM started several tasks: start one, which starts torchrun")
    elif not dist.is_initialized():
        limit = timedelta(hours=6)  # rank 0 may read a slow disk for more than 10 minutes
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        except ValueError as error:
            raise UsageError(f"{error}: start with torchrun, or unset RANK, WORLD_SIZE") from error
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # its restarts keep the old keys
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def main(argv=None):
    """Run a command line. UsageError and lack of memory end in one line and exit 2, a signal in one
    line and exit 128 + its number; any other exception is a bug, or an edit of yours, and is shown
    whole."""
    try:
        args = parse(argv)
        if argv is None:  # a notebook keeps its KeyboardInterrupt
            for signum in SIGNALS:
                signal.signal(signum, on_signal)
        join_processes("nccl" if args.device.type == "cuda" else "gloo")
        untaught = (args.teacher, args.teacher_weights) == ("vit_digits_patch4_32", "pretrained")
        is_demo = untaught and DIGITS(args.data) and args.task == "pretrain" and args.epochs
        (demo if is_demo else train)(args)
        if dist.is_initialized():  # after an error it could wait for the others
            dist.destroy_process_group()
    except UsageError as error:
        fail(str(error).rpartition("UsageError: ")[2])  # a worker puts its traceback before it
    except torch.OutOfMemoryError as error:
        fail(f"lower --micro-batch, now {args.micro_batch}: {error}")


def fail(text):
    """Exit with one line, written at once, so that several ranks' do not mix."""
    sys.stderr.write(f"train.py: error: {' '.join(text.split())}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
