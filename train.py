"""Train and evaluate with MaskAlign (maskalign.py).

    python train.py                                                  # demo: digits, no download
    torchrun --nproc_per_node=8 train.py --data /imagenet            # the paper's pre-training
    python train.py --task finetune --init out/student.pt --data /imagenet        # or --task probe

--data: a folder with train/ and val/ of one folder per class, any folder of images, digits (drawn
as needed), synthetic (noise on the device), or N of either: digits:N. --out/last.pt is resumed.
"""
import argparse, contextlib, ctypes, functools, hashlib, json, logging, math, os, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.utils import accuracy
from torch import distributed as dist, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm
from maskalign import MaskAlign, load_encoder, load_teacher, read_weights, vit, whiten

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOG_EVERY = 10  # optimiser steps; the host waits for the GPU at no others
KNN = dict(k=20, temperature=0.07)
COLUMNS = ("epochs", "batch_size", "blr", "min_lr", "warmup_epochs", "weight_decay", "drop_path",
           "layer_decay", "eval_every")
RECIPES = {  # each default stands here, once: the paper's for ViT-B on ImageNet, then the digits'
    "pretrain": (200.0, 1024, 1.5e-4, 1e-5, 20.0, 0.05, 0.1, 1.0, 20.0),
    "finetune": (100.0, 1024, 3e-4, 1e-6, 5.0, 0.05, 0.2, 0.55, 1.0),
    "probe": (90.0, 16384, 0.025, 0.0, 10.0, 0.0, 0.0, 1.0, 1.0),
    "digits": (1.0, 64, 8e-3, 1e-6, 0.1, 0.05, 0.0, 1.0, 1.0)}  # all tasks
COMMON = dict(task="pretrain", data="digits", out="out", student="vit_base_patch16_224", init=None,
              seed=0, teacher="ViT-B-16-quickgelu", teacher_weights="openai", levels=5, amp=None,
              mask="attentive", mask_ratio=0.7, micro_batch=256, save_every=1000, compile=None,
              device=None, workers=min(16, os.cpu_count()))
DIGITS = dict(student="vit_digits_patch4_32", teacher="vit_digits_patch4_32", levels=3, workers=0)
CHOICES = dict(task=[*RECIPES][:3], amp=("bf16", "fp16", "off"), mask=("attentive", "random"))
MAY_BE_0 = {"min_lr", "warmup_epochs", "weight_decay", "drop_path", "mask_ratio", "workers", "seed"}
FREE = {"out", "data", "workers", "device", "compile", "micro_batch", "save_every", "eval_every"}

# --- Data: an image depends on (seed, epoch, index) alone ---------------------------------------
def seed_of(*key):  # any key -> a 63-bit seed
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1

class Digits:
    """Rendered digits of a size (H, W), in all epochs the same if `fixed`. As from every source:
    keys (epoch, index) -> images uint8 [b,3,H,W], labels [b], {file: reason} of the unreadable."""
    def __init__(self, count, size, seed, fixed):
        self.names, self.classes, self.glyphs = range(count), list("0123456789"), []
        self.size, self.seed, self.fixed, self.limit, self.mix = size, seed, fixed, 0, None
        for digit in self.classes:
            glyph, font = Image.new("L", size[::-1]), ImageFont.load_default(size[0] * 7 / 8)
            ImageDraw.Draw(glyph).text((size[1] / 2, size[0] / 2), digit, 255, font, "mm")
            self.glyphs.append(v2.functional.pil_to_tensor(glyph) / 255)
    def __getitems__(self, keys):
        labels = torch.tensor([index % 10 for _, index in keys])
        u = torch.stack([torch.rand(55, generator=torch.Generator().manual_seed(seed_of(
            self.seed, 0 if self.fixed else epoch, index))) for epoch, index in keys])
        angle, scale = u[:, 0] - 0.5, 0.8 + 0.8 * u[:, 1]
        x, y = ((u[:, 2:4] - 0.5) * 0.6 * scale[:, None]).unbind(1)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        theta = rearrange([cos, -sin, x, sin, cos, y], "(i j) b -> b i j", i=2)
        grid = F.affine_grid(theta, [len(u), 1, *self.size], align_corners=False)
        alpha = F.grid_sample(torch.stack(self.glyphs)[labels], grid, align_corners=False)
        ink = rearrange(0.8 + 0.2 * u[:, 4:7], "b c -> b c 1 1")
        ground = rearrange(0.15 * u[:, 7:55], "b (c h w) -> b c h w", c=3, h=4)
        ground = F.interpolate(ground, self.size, mode="bilinear", align_corners=False)
        return ((ground + alpha * (ink - ground)) * 255).round().byte(), labels, {}

def as_seen(image):
    """A Pillow image -> RGB as a viewer shows it: upright, on white, 16-bit grey in its range."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")

class Folder:
    """Images of (file, class) pairs, at random cropped, flipped and more for a task; or centred."""
    def __init__(self, files, classes, size, seed, task=None):
        (self.names, folders), self.classes, self.size, self.seed = zip(*files), classes, size, seed
        self.labels = [classes.get(folder, 0) for folder in folders]
        self.limit = min(len(files) - 1, max(10, len(files) // 100))  # of unreadable files
        crop = [v2.RandomResizedCrop(size, (0.2 if task == "pretrain" else 0.08, 1.0),
                interpolation=Image.BICUBIC), v2.RandomHorizontalFlip()] if task else [
                    v2.Resize(min(size) * 256 // 224, Image.BICUBIC), v2.CenterCrop(size)]
        more = [v2.RandAugment(2, 9), v2.RandomErasing(0.25)] if task == "finetune" else []
        self.augment = v2.Compose([v2.PILToTensor(), *crop, *more])  # uint8 tensors resize faster
        self.mix = v2.RandomChoice([mix(alpha=alpha, num_classes=len(classes)) for mix, alpha in (
            (v2.MixUp, 0.8), (v2.CutMix, 1.0))]) if more else None  # of a micro-batch
    def __getitems__(self, keys):
        images = torch.zeros(len(keys), 3, *self.size, dtype=torch.uint8)
        labels, bad = torch.zeros(len(keys), dtype=torch.long), {}
        for row, (epoch, index) in enumerate(keys):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            while len(bad) <= self.limit:  # beyond it the run stops
                try:
                    with Image.open(self.names[index]) as image:
                        image.draft(None, [4 * side for side in self.size])  # JPEG: at 1/2 to 1/8
                        images[row], labels[row] = self.augment(as_seen(image)), self.labels[index]
                    break
                except Exception as error:  # a bad file can raise nearly anything
                    bad[self.names[index]] = repr(error)
                    index = (index + 1) % len(self.names)  # its neighbour stands in
        return images, labels, bad

def scan(root):
    """A folder -> sorted (file, split, class) of the images in root/split/class or below."""
    found = ((os.path.join(at, name), *place) for at, _, names in os.walk(root, followlinks=True)
             for place in [(*Path(at).relative_to(root).parts, "", "")[:2]] for name in names
             if name.lower().endswith((*IMG_EXTENSIONS, ".gif")))
    return sorted(tqdm(found, f"scanning {root}", unit=" images", delay=2))

def open_data(args, size):
    """--data -> training source, bank of k-NN's neighbours, labelled val source or None."""
    kind, _, count = args.data.partition(":")
    if kind in ("digits", "synthetic") and (count or "1").strip("0").isdecimal():  # N > 0
        train = Digits(int(count or 76800), size, seed_of(args.seed, "train"), bool(count))
        bank = Digits(2000, size, seed_of(args.seed, "bank"), True)
        return train, bank, Digits(1000, size, -1, True) if kind == "digits" else None
    found = [scan(args.data) if RANK == 0 else None]
    if dist.is_initialized():  # a network disk may show each rank another folder
        dist.broadcast_object_list(found)
    files, val = ([(file, name) for file, split, name in found[0] if split == part and name]
                  for part in ("train", "val"))
    classes = {name: i for i, name in enumerate(sorted({name for _, name in files}))}
    if not classes:
        files, val = [(file, "") for file, split, _ in found[0] if split != "val"], []
    if not files:
        raise ValueError(f"--data: there is no such folder, or no image in it: {args.data}")
    if odd := {name for _, name in val} - classes.keys():
        raise ValueError(f"--data: val has classes that train lacks: {sorted(odd)[:3]}")
    return (Folder(files, classes, size, args.seed, args.task), Folder(files, classes, size, 0),
            Folder(val, classes, size, 0) if val else None)

@functools.lru_cache(maxsize=2)
def order(count, seed, epoch):
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()

def loader(source, keys, size, args, device):
    if args.data.partition(":")[0] == "synthetic":
        images = torch.randint(256, (size, 3, *source.size), dtype=torch.uint8, device=device)
        yield from iter(lambda: (images, images[:, 0, 0, 0] % 10, {}), None)  # for ever
    torch.multiprocessing.set_forkserver_preload(["timm", "torchvision"])  # once, not by worker
    yield from torch.utils.data.DataLoader(  # workers by fork could hang where threads are
        source, size, sampler=keys, collate_fn=tuple, pin_memory=device.type == "cuda",
        num_workers=args.workers, multiprocessing_context="forkserver" if args.workers else None)

class Classifier(nn.Module):
    """Images [B,3,H,W] -> logits [B,classes], from the mean patch token, normed; probe: frozen."""
    def __init__(self, student, classes, probe):
        super().__init__()
        self.student = student.requires_grad_(not probe)
        student.norm.requires_grad_(False)
        norm = nn.BatchNorm1d(student.dim, affine=False) if probe else nn.LayerNorm(student.dim)
        self.align = nn.Sequential(norm, nn.Linear(student.dim, classes))
        nn.init.normal_(self.align[1].weight, std=0.01)
    def forward(self, images, noise=None):
        return self.align(self.student(images, noise=noise)[-1][:, 1:].mean(dim=1))

def param_groups(model, weight_decay, layer_decay=1.0):
    """Trainable parameters in groups by learning-rate scale, layer_decay^(S+1−l) for layer l of S
    and 1 for the rest, and weight decay, 0 for 1-D parameters and W."""
    depth, groups = len(model.student.blocks), {}
    for name, parameter in model.named_parameters():
        part, inner, number = f"{name}..".split(".")[:3]
        layer = depth + 1 if part != "student" else int(number) + 1 if inner == "blocks" else 0
        decay = weight_decay if parameter.ndim > 1 and name != "align.matrix" else 0.0
        if parameter.requires_grad:
            groups.setdefault((layer_decay ** (depth + 1 - layer), decay), []).append(parameter)
    return [dict(params=p, scale=scale, weight_decay=wd) for (scale, wd), p in groups.items()]

def learning_rate(step, steps, warmup, peak, floor):
    """Linear warm-up to peak over `warmup` steps, then a cosine that ends at floor."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

def gather(mine):  # any object -> every rank's, by rank; all wait for the last
    ranks = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(ranks, mine)
    return ranks

@torch.no_grad()
def outputs(function, source, args, device):
    """function(images) and label of every image of a source -> [n,C], [n]; the ranks share it."""
    keys = [(0, index) for index in range(RANK, len(source.names), WORLD)]
    mine = [(function(images.to(device)).float().cpu(), labels)
            for images, labels, _ in loader(source, keys, args.micro_batch, args, device)]
    return [torch.cat(each).to(device) for each in zip(*sum(gather(mine), []))]

def knn(encoder, bank, val, args, device):
    """k-NN accuracy on val in percent: cosine of whitened mean patch tokens, neighbours in bank."""
    feature = lambda images: F.normalize(whiten(encoder(images)[-1][:, 1:].mean(dim=1)), dim=1)
    keys, classes = outputs(feature, bank, args, device)
    def votes(images):
        cosine, index = (feature(images) @ keys.T).topk(min(KNN["k"], len(keys)), dim=1)
        none = keys.new_zeros(len(images), len(bank.classes))
        return none.scatter_add(1, classes[index], (cosine / KNN["temperature"]).exp())
    return accuracy(*outputs(votes, val, args, device))[0].item()

# --- The one loop -------------------------------------------------------------------------------
def write(path, content):  # whole or not at all
    try:
        with open(f"{path}.part", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, on a full disk
        raise OSError(f"{path} could not be written, and is as it was: {error}") from error

def save(out, kept, **rest):  # kept: what has a state_dict
    write(out / "student.pt", kept["student"].state_dict())
    write(out / "last.pt", {name: part.state_dict() for name, part in kept.items()} | rest)

def resume(out, kept, settings):  # -> steps done, log, unreadable files; loads what is kept
    if RANK == 0 and not (out / "last.pt").exists():
        if (out / "log.jsonl").exists():
            raise ValueError(f"{out} holds a log.jsonl but no last.pt; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        save(out, kept, step=0, log=[], bad={}, arguments=settings)
    gather(None)  # the others wait for rank 0's file
    last = read_weights(out / "last.pt")  # a new run's, too
    old = last.get("arguments", {})
    if odd := [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]:
        raise ValueError(f"{out}/last.pt is of a run with other arguments, repeat these: {odd}")
    for name, part in kept.items():
        part.load_state_dict(last.pop(name))
    return last["step"], last["log"], last["bad"]

def build(args, device, dtype):
    """-> (model, teacher or None, (training, bank, val) sources)."""
    torch.manual_seed(args.seed)
    student, teacher = vit(args.student, drop_path=args.drop_path), None
    sources = open_data(args, student.image_size)
    if args.init:
        print(args.init, "left aside:", {k.split(".")[0] for k in load_encoder(student, args.init)})
    if args.task == "pretrain":
        weights = None if args.teacher_weights == "random" else args.teacher_weights
        teacher = load_teacher(args.teacher, weights, args.levels).to(device, dtype)
        model = MaskAlign(student, teacher, args.mask, args.mask_ratio)
    elif not sources[0].classes:
        raise ValueError(f"--task {args.task} needs labels: a folder for each class in train/")
    else:
        model = Classifier(student, len(sources[0].classes), args.task == "probe")
    return model.to(device).train(), teacher, sources

def train(args):
    """Run one task -> (model, teacher, bank, val, last record of the log)."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out, batch, share = Path(args.out), args.batch_size, args.batch_size // WORLD
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    amp = args.amp or (half if device.type == "cuda" else "off")
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)[amp]
    cast = torch.autocast(device.type, dtype, enabled=amp != "off")  # a decorator: cast(f)(x)
    micro = max(m for m in range(1, min(share, args.micro_batch) + 1) if share % m == 0)
    model, teacher, (data, bank, val) = build(args, device, dtype)
    count, parts, per_epoch = len(data.names), share // micro, len(data.names) / batch  # steps
    steps, warmup = max(1, int(args.epochs * per_epoch)), int(args.warmup_epochs * per_epoch)
    rate = lambda step: learning_rate(step, steps, warmup, args.blr * batch / 256, args.min_lr)
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimiser = torch.optim.SGD(groups, momentum=0.9, fused=True) if args.task == "probe" else (
        torch.optim.AdamW(groups, betas=(0.9, 0.95 if teacher else 0.999), fused=True))
    # outside fp16 the scale is 1: what remains is that a non-finite gradient takes no step
    scale, interval = (2.0 ** 16, 2000) if amp == "fp16" else (1.0, 2 ** 31 - 1)
    scaler = torch.amp.GradScaler(device.type, scale, growth_interval=interval)
    smoothing = 0.1 * (args.task == "finetune")
    settings = {k: vars(args)[k] for k in vars(args).keys() - FREE} | dict(images=count, amp=amp)
    kept = dict(student=model.student, align=model.align, optimiser=optimiser, scaler=scaler)
    done, log, bad = resume(out, kept, settings)
    sink = open(out / "log.jsonl" if RANK == 0 else os.devnull, "w", buffering=1)  # by the line
    sink.writelines(json.dumps(record) + "\n" for record in log)
    if RANK == 0:
        print(f"{args.task}: {count} images of {args.data}; {steps} steps, from {done}, of {batch} "
              f"= {WORLD} processes x {parts} x {micro}; lr {args.blr * batch / 256:.2e}; {device} "
              f"{amp}; {'no ' * (not val)}evaluation{'; finished' * (done == steps)}", flush=True)
    run, observe = model, teacher or (lambda images: ())
    if args.compile or (args.compile is None and device.type == "cuda"):
        try:  # a type that einops first meets in a trace, as Parameter, would have it traced again
            torch.compile(lambda x: rearrange(x, "... -> ...") + 1)(next(model.parameters()))
            run, observe = torch.compile(model), torch.compile(observe)
        except Exception as error:
            print(f"no compiler works here, so nothing is compiled: {str(error)[:200]}")
    ddp = nn.parallel.DistributedDataParallel(run) if WORLD > 1 else run
    def backward(images, labels, noise):  # -> loss; a second try must go round DDP's hooks
        loss = cast(ddp if len(images) == micro else run)(images, *observe(images), noise=noise)
        loss = loss if teacher else F.cross_entropy(loss.float(), labels, label_smoothing=smoothing)
        cost = scaler.scale(loss / parts * (1 + 0 * loss.detach()))  # 0·inf = NaN, for all ranks
        cost.backward() if len(images) == micro else torch.autograd.grad(cost, groups[0]["params"])
        return loss.detach()
    def keys(step, rank):  # a step's images are the same at any number of processes
        places = range(step * batch, (step + 1) * batch)[rank * share:][:share]
        return [(at // count, order(count, args.seed, at // count)[at % count]) for at in places]
    ahead = (key for step in range(done, steps) for key in keys(step, RANK))
    stream = loader(data, ahead, micro, args, device)
    draws = 2 * len(model.student.blocks) + (math.prod(model.student.grid) if teacher else 0)
    bar = tqdm(range(done, steps), initial=done, total=steps, disable=RANK > 0, mininterval=10)
    trail, fresh, waited, since = [], {}, 0.0, time.perf_counter()
    for done, step in enumerate(bar, done + 1):  # done: once this step is
        for group in optimiser.param_groups:
            group["lr"] = rate(step) * group["scale"]
        generator = torch.Generator(device).manual_seed(seed_of(args.seed, "step", step))
        noise = torch.rand(batch, draws, generator=generator, device=device)
        losses = []
        for part, piece in enumerate(noise[RANK * share:][:share].split(micro)):
            asked = time.perf_counter()
            images, labels, unreadable = next(stream)
            waited += time.perf_counter() - asked
            fresh |= unreadable
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            if data.mix:
                torch.default_generator.manual_seed(seed_of(args.seed, "mix", step, RANK, part))
                images, labels = data.mix(images / 255, labels)
            ddp.require_backward_grad_sync = part == parts - 1  # as its no_sync() does
            fits = 2 * micro  # halved at once: only micro trains, less is tried to name what fits
            while len(losses) == part and (fits := fits // 2):
                with contextlib.suppress(torch.OutOfMemoryError):
                    losses.append(backward(images[:fits], labels[:fits], piece[:fits]))
            if fits < micro:
                raise torch.OutOfMemoryError(f"({micro} exceeds memory, {fits} fits)")
        scaler.unscale_(optimiser)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(optimiser)  # takes none if a gradient is not finite
        scaler.update()
        optimiser.zero_grad()
        trail.append(torch.stack([torch.stack(losses).mean(), norm]))
        saves = done % args.save_every == 0 or done == steps
        if not saves and done % LOG_EVERY:
            continue
        first, mine = done - len(trail), (torch.stack(trail).tolist(), fresh)  # the host waits
        taken, ranks = time.perf_counter() - since, gather(mine)
        table = torch.tensor([each for each, _ in ranks]).permute(1, 2, 0)  # step, loss|norm, rank
        finite = table.isfinite() | torch.tensor([[False], [scaler.get_scale() >= 1]])  # fp16 skips
        for step, _, by in ((~finite).nonzero() + torch.tensor([first, 0, 0])).tolist():
            names = [data.names[index] for _, index in keys(step, by)]
            raise FloatingPointError(f"non-finite loss or gradient in step {step + 1}, rank {by}, "
                                     f"lr {rate(step):.3g}; {out}/last.pt is of before; {names}")
        new = {k: v for _, found in ranks for k, v in found.items() if k not in bad}
        if RANK == 0 and new:
            print(f"unreadable, their neighbours stand in: {new}", file=sys.stderr)
        bad |= new
        if len(bad) > data.limit:
            raise ValueError(f"{len(bad)} of {count} files are unreadable: {[*bad.items()][:3]}")
        record = dict(step=done, epoch=done / per_epoch, lr=rate(done - 1), unreadable=len(bad),
                      loss=table[:, 0].mean().item(), grad_norm=table[:, 1, 0].median().item(),
                      images_per_s=len(trail) * batch / taken, data_wait=waited / taken)
        if val and (done == steps or done % (per_epoch * args.eval_every) < done - first):  # due
            record |= dict(knn=knn(cast(model.eval().student), bank, val, args, device)) if (
                teacher) else dict(zip(("top1", "top5"), map(float, accuracy(
                    *outputs(cast(model.eval()), val, args, device), topk=(1, 5)))))
            model.train()
        if RANK == 0 and record.get("top1", 0) > max(r.get("top1", 0) for r in [{}, *log]):
            write(out / "best.pt", model.state_dict())
        log.append(record)
        sink.write(json.dumps(record) + "\n")
        if RANK == 0 and saves:
            save(out, kept, step=done, log=log, bad=bad, arguments=settings)
        bar.set_postfix(record, refresh=False)
        trail, fresh, waited, since = [], {}, 0.0, time.perf_counter()
    return model, teacher, bank, val, log[-1]

def demo(args):  # a teacher with labels, a student without
    train(argparse.Namespace(**vars(args) | dict(task="finetune", out=f"{args.out}/teacher")))
    args.teacher_weights, args.out = f"{args.out}/teacher/student.pt", f"{args.out}/student"
    model, teacher, bank, val, record = train(args)
    device = model.align.matrix.device
    untrained = knn(build(args, device, torch.float32)[0].student.eval(), bank, val, args, device)
    taught = knn(lambda images: teacher(images)[0], bank, val, args, device)
    print(f"k-NN {KNN}, mean patch token: untrained student {untrained:.1f} %, "
          f"trained student {record['knn']:.1f} %, teacher {taught:.1f} %")

def parse(argv):
    """A command line -> all arguments, with the task's defaults. Raises ValueError if it is bad."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, values in (COMMON | dict(zip(COLUMNS, zip(*RECIPES.values())))).items():
        v = values[0] if key in COLUMNS else values
        options = dict(action=argparse.BooleanOptionalAction) if key == "compile" else dict(
            type=type("" if v is None else v), choices=CHOICES.get(key), help=f"default {values}")
        parser.add_argument("--" + key.replace("_", "-"), **options)
    given = {key: v for key, v in vars(parser.parse_args(argv)).items() if v is not None}
    args = COMMON | given
    recipe = "digits" if args["data"].partition(":")[0] == "digits" else args["task"]
    demo = dict(DIGITS, teacher_weights=COMMON["teacher_weights"] if "teacher" in given else None)
    args |= dict(zip(COLUMNS, RECIPES[recipe])) | (demo if recipe == "digits" else {}) | given
    for key, v in args.items():
        top = dict(layer_decay=1, mask_ratio=1, drop_path=0.99).get(key, 2 ** 31)  # 1/(1−p)
        if type(v) in (int, float) and not (0 < v <= top or v == 0 and key in MAY_BE_0):
            raise ValueError(f"--{key.replace('_', '-')} {v} is out of range")
    if args["batch_size"] % WORLD:
        raise ValueError(f"--batch-size {args['batch_size']} is not divisible by {WORLD} processes")
    kinds = ("cpu", "mps", "cuda") if torch.cuda.is_available() else ("cpu", "mps")
    if (args["device"] or "cpu").partition(":")[0] not in kinds:
        raise ValueError(f"--device {args['device']} is not available here")
    return argparse.Namespace(**args)

def main(argv=None):
    """Run a command line. Errors of use are one line, unmixed with other ranks', and exit 2."""
    logging.root.setLevel(logging.CRITICAL)  # open_clip logs there what its exceptions say
    try:
        args = parse(argv)
        if "RANK" in os.environ and not dist.is_initialized():
            if sys.platform == "linux":  # die with torchrun: an orphan would write beside its heir
                ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
            if torch.cuda.is_available() and args.device != "cpu":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            store, rank, world = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun restarts with the old keys
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group(store=store, rank=rank, world_size=world)
        (demo if args.task == "pretrain" and args.teacher_weights is None else train)(args)
        if dist.is_initialized():  # after an error it could wait for the others
            dist.destroy_process_group()
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        hints = {torch.OutOfMemoryError: "lower --micro-batch", ConnectionError: "worker died"}
        words = [hints[kind] for kind in hints if isinstance(error, kind)] + str(error).split()
        argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS).error(" ".join(words))

if __name__ == "__main__":
    main()
