"""Train and evaluate with MaskAlign (maskalign.py).

    python train.py                                                  # demo: digits, no download
    torchrun --nproc_per_node=8 train.py --data /imagenet            # the paper's pre-training
    python train.py --task finetune --init out/student.pt --data /imagenet        # or --task probe

--data is a folder with train/ and val/ of one folder per class, any folder of images, or "digits"
(rendered as needed; "digits:N" for N fixed ones). A run that finds its --out/last.pt resumes it.
"""
import argparse, atexit, functools, hashlib, json, logging, math, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms import v2
from tqdm import tqdm
from maskalign import MaskAlign, load_encoder, load_teacher, read_weights, vit, whiten

LOG_EVERY = 10  # optimiser steps; the host waits for the GPU at no others
KNN = dict(k=20, temperature=0.07)
COLUMNS = ("epochs", "batch_size", "blr", "min_lr", "warmup_epochs", "weight_decay", "drop_path",
           "layer_decay", "eval_every")
RECIPES = {  # each default stands here, once: paper.md's for ViT-B on ImageNet, then the digits'
    "pretrain": (200.0, 1024, 1.5e-4, 1e-5, 20.0, 0.05, 0.1, 1.0, 20.0),
    "finetune": (100.0, 1024, 3e-4, 1e-6, 5.0, 0.05, 0.2, 0.55, 1.0),
    "probe": (90.0, 16384, 0.025, 0.0, 10.0, 0.0, 0.0, 1.0, 1.0),
    "digits": (1.0, 64, 8e-3, 1e-6, 0.1, 0.05, 0.0, 1.0, 1.0)}  # all tasks
COMMON = dict(
    data="digits", out="out", student="vit_base_patch16_224", init=None, seed=0, micro_batch=256,
    teacher="ViT-B-16-quickgelu", teacher_weights="openai", levels=5, mask="attentive",
    mask_ratio=0.7, save_every=1000, workers=None, amp=None, compile=None, device=None)
DIGITS = dict(student="vit_digits_patch4_32", teacher="vit_digits_patch4_32", levels=3, workers=0)
CHOICES = dict(amp=("bf16", "fp16", "off"), mask=("attentive", "random"))
FREE = {"out", "data", "workers", "device", "compile", "micro_batch", "save_every", "eval_every"}

# --- Data: an image depends on (seed, epoch, index) alone ---------------------------------------
def seed_of(*key):
    """Any key -> a 63-bit seed."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1

class Digits:
    """Rendered digits of a size (H, W), in all epochs the same if `fixed`. As from every source:
    keys (epoch, index) -> images uint8 [b,3,H,W], labels [b], {file: reason} of the unreadable."""
    def __init__(self, count, size, seed, fixed):
        self.names, self.classes, self.glyphs = range(count), list("0123456789"), []
        self.size, self.seed, self.fixed = size, seed, fixed
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

class Folder:
    """Images of (file, label) pairs, randomly cropped to a share `area` (least, most) and flipped,
    and with RandAugment and erasing if `augment`; without `area` the centre is cropped."""
    def __init__(self, files, classes, size, seed, area=None, augment=False):
        (self.names, self.labels), self.classes, self.seed = zip(*files), classes, seed
        crop = [v2.RandomResizedCrop(size, area, interpolation=Image.BICUBIC),
                v2.RandomHorizontalFlip()] if area else [
                    v2.Resize(min(size) * 256 // 224, Image.BICUBIC), v2.CenterCrop(size)]
        more = [v2.RandAugment(2, 9), v2.RandomErasing(0.25)] if augment else []
        self.transform = v2.Compose([*crop, v2.PILToTensor(), *more])
    def __getitems__(self, keys):
        images, labels, bad = [], [], {}
        for epoch, index in keys:
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            while len(images) == len(labels):
                try:
                    with Image.open(self.names[index]) as image:
                        image = ImageOps.exif_transpose(image).convert("RGB")
                        images.append(self.transform(image))
                except Exception as error:  # a bad file can raise nearly anything
                    bad[self.names[index]] = repr(error)
                    index = (index + 1) % len(self.names)  # its neighbour stands in
                if len(bad) > min(len(self.names) - 1, max(10, len(self.names) // 100)):
                    raise ValueError(f"{len(bad)} files are unreadable: {list(bad.items())[:3]}")
            labels.append(self.labels[index])
        return torch.stack(images), torch.tensor(labels), bad

def open_data(args, size):
    """--data -> training source, the same without augmentation, labelled val source or None."""
    kind, _, count = args.data.partition(":")
    if kind == "digits":
        train = Digits(int(count or 76800), size, seed_of(args.seed, "train"), bool(count))
        bank = Digits(2000, size, seed_of(args.seed, "bank"), True)
        return train, bank, Digits(1000, size, -1, True)
    root, endings, val = Path(args.data), IMG_EXTENSIONS + (".gif",), None
    # a class named "" is the folder itself, with all that lies below it
    classes, numbers = find_classes(root / "train") if (root / "train").is_dir() else ([], {"": 0})
    files = make_dataset(root / "train" if classes else root, numbers, endings, None, not classes)
    if not files:
        raise ValueError(f"--data: there is no such folder, or no image in it: {root}")
    if classes and (root / "val").is_dir():
        if odd := set(find_classes(root / "val")[0]) - set(classes):
            raise ValueError(f"--data: {root}/val has classes that train lacks: {sorted(odd)[:3]}")
        val = Folder(make_dataset(root / "val", numbers, endings, None, True), classes, size, 0)
    bank, area = Folder(files, classes, size, 0), (0.2 if args.task == "pretrain" else 0.08, 1.0)
    bank.__getitems__([(0, 0)])  # a folder of unreadable images is an error now, not in an hour
    return Folder(files, classes, size, args.seed, area, args.task == "finetune"), bank, val

@functools.lru_cache(maxsize=2)
def permutation(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

def sample_keys(count, seed, positions):
    """Positions in an endless stream of permuted epochs -> keys (epoch, index)."""
    order = [permutation(count, seed_of(seed, "order", p // count)) for p in positions]
    return [(p // count, epoch[p % count]) for p, epoch in zip(positions, order)]

def loader(source, batches, args, device):
    method = "forkserver" if args.workers else None  # to fork a process with threads can hang
    return torch.utils.data.DataLoader(
        source, batch_sampler=batches, collate_fn=tuple, num_workers=args.workers,
        pin_memory=device.type == "cuda", multiprocessing_context=method)

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
    """Trainable parameters in groups by learning-rate scale and weight decay. None for 1-D
    parameters and W; layer l of S is scaled by layer_decay^(S+1−l), the rest by 1."""
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

@torch.no_grad()
def outputs(function, source, args, device):
    """function(images) and label of every image of a source -> [n,C], [n]."""
    batches = torch.tensor([(0, i) for i in range(len(source.names))]).split(256)
    pairs = [(function(images.to(device)).float(), labels.to(device))
             for images, labels, _ in loader(source, [b.tolist() for b in batches], args, device)]
    return map(torch.cat, zip(*pairs))

def knn(encoder, bank, val, args, device):
    """k-NN accuracy in percent of an encoder on val, by its neighbours in bank: cosine of mean
    patch tokens of the last block, whitened; votes weighed by exp(cosine / temperature)."""
    feature = lambda images: F.normalize(whiten(encoder(images)[-1][:, 1:].mean(dim=1)), dim=1)
    (keys, classes), (queries, truth) = (outputs(feature, s, args, device) for s in (bank, val))
    right = 0
    for query, label in zip(queries.split(256), truth.split(256)):
        cosine, index = (query @ keys.T).topk(min(KNN["k"], len(keys)), dim=1)
        votes = F.one_hot(classes[index]) * (cosine / KNN["temperature"]).exp()[..., None]
        right += (votes.sum(dim=1).argmax(dim=1) == label).sum().item()
    return 100 * right / len(truth)

def evaluate(model, bank, val, args, device):
    """-> results in percent: knn for pre-training, else top1 and top5."""
    model.eval()
    if args.task == "pretrain":
        return dict(knn=knn(model.student, bank, val, args, device))
    logits, truth = outputs(model, val, args, device)
    hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]).float()
    return dict(top1=100 * hits[:, 0].mean().item(), top5=100 * hits.sum(1).mean().item())

# --- The one loop -------------------------------------------------------------------------------
def write(path, dump):
    """dump(file) to a file, whole or not at all."""
    try:
        with open(f"{path}.part", "wb") as file:
            dump(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, on a full disk
        raise OSError(f"{path} could not be written, and is as it was: {error}") from error

def build(args, device, dtype):
    """-> (model, teacher or None, (training, bank, val) sources)."""
    torch.manual_seed(args.seed)
    student, teacher = vit(args.student, drop_path=args.drop_path), None
    sources = open_data(args, student.image_size)
    if args.init:
        aside = {key.split(".")[0] for key in load_encoder(student, args.init)}
        print(f"{args.init} left aside: {sorted(aside)}")
    if args.task == "pretrain":
        weights = None if args.teacher_weights == "random" else args.teacher_weights
        teacher = load_teacher(args.teacher, weights, args.levels).to(device, dtype)
        model = MaskAlign(student, teacher, args.mask, args.mask_ratio)
    elif not sources[0].classes:
        raise ValueError(f"--task {args.task} needs labels: a folder for each class in train/")
    else:
        model = Classifier(student, len(sources[0].classes), args.task == "probe")
    return model.to(device).train(), teacher, sources

def restore(path, parts, settings):
    """Load last.pt, if there is one, into the parts -> step. Raises if its settings differ."""
    if not path.exists():
        return 0
    last = read_weights(path)
    before = last.get("arguments", {})
    if odd := [f"{k} {before.get(k)} -> {v}" for k, v in settings.items() if before.get(k) != v]:
        raise ValueError(f"{path} is of a run with other arguments, repeat these: {', '.join(odd)}")
    for name, part in parts.items():
        part.load_state_dict(last[name])
    return last["step"]

def train(args):
    """Run one task -> (model, teacher, bank, val, last record of the log)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda, out, batch = device.type == "cuda", Path(args.out), args.batch_size
    amp = args.amp or ("off" if not cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)[amp]
    if batch % world:
        raise ValueError(f"--batch-size {batch} is not divisible by {world} processes")
    share = batch // world
    micro = max(m for m in range(1, min(share, args.micro_batch) + 1) if share % m == 0)
    model, teacher, (data, bank, val) = build(args, device, dtype)
    count, parts, epoch = len(data.names), share // micro, len(data.names) / batch  # epoch: steps
    steps, warmup = max(1, int(args.epochs * epoch)), int(args.warmup_epochs * epoch)
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    betas, smoothing = (0.9, 0.95 if teacher else 0.999), 0.1 * (args.task == "finetune")
    optimiser = torch.optim.SGD(groups, momentum=0.9, fused=True) if args.task == "probe" else (
        torch.optim.AdamW(groups, betas=betas, fused=True))
    mix = v2.RandomChoice([kind(alpha=alpha, num_classes=len(data.classes or "-"))
                           for kind, alpha in ((v2.MixUp, 0.8), (v2.CutMix, 1.0))])
    # outside fp16 the scale is 1: what remains is that a non-finite gradient takes no step
    scale = (2.0 ** 16, 2000) if amp == "fp16" else (1.0, 2 ** 31 - 1)
    scaler = torch.amp.GradScaler(device.type, scale[0], growth_interval=scale[1])
    settings = {key: vars(args)[key] for key in vars(args).keys() - FREE} | dict(images=count)
    kept = dict(student=model.student, align=model.align, optimiser=optimiser, scaler=scaler)
    done, log = restore(out / "last.pt", kept, settings), out / "log.jsonl"
    if log.exists() and not (out / "last.pt").exists():
        raise ValueError(f"{out} holds a log.jsonl but no last.pt; choose another --out")
    lines = log.read_text().splitlines(True) if log.exists() else []
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    if done >= steps:
        print(f"{out} holds a finished run of {steps} steps")
        return model, teacher, bank, val, json.loads(lines[-1])
    def save():
        state = {name: part.state_dict() for name, part in kept.items()}
        write(out / "student.pt", lambda file: torch.save(state["student"], file))
        state |= dict(step=done, arguments=settings)
        write(out / "last.pt", lambda file: torch.save(state, file))
    if rank == 0:
        print(f"{args.task}: {args.student}; teacher {teacher and args.teacher}; {count} images of "
              f"{args.data}; {steps} steps, from {done}, of {batch} images = {world} processes x "
              f"{parts} x {micro}; lr {args.blr * batch / 256:.2e}; {device}, amp {amp}; "
              f"{'evaluated on val' if val else 'no labelled val, no evaluation'}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        save()  # before the log: a log without last.pt is an error to the other ranks
        write(log, lambda file: file.write("".join(lines).encode()))
    wrap = torch.compile if (cuda if args.compile is None else args.compile) else lambda x: x
    run, observe = wrap(model), teacher and wrap(teacher)
    if world > 1:
        run = nn.parallel.DistributedDataParallel(run)
    firsts = (step * batch + rank * share + at
              for step in range(done, steps) for at in range(0, share, micro))
    batches = (sample_keys(count, args.seed, range(first, first + micro)) for first in firsts)
    stream, named = iter(loader(data, batches, args, device)), set()
    columns = 2 * len(model.student.blocks) + (math.prod(model.student.grid) if teacher else 0)
    health, meter = torch.ones((), device=device), torch.zeros((), device=device)
    best = max([json.loads(line).get("top1", 0) for line in lines], default=0)
    logged, waited, since = done, 0.0, time.perf_counter()
    bar = tqdm(total=steps, initial=done, disable=rank > 0,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    while done < steps:
        lr = learning_rate(done, steps, warmup, args.blr * batch / 256, args.min_lr)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["scale"]
        generator = torch.Generator(device).manual_seed(seed_of(args.seed, "step", done))
        noise = torch.rand(batch, columns, generator=generator, device=device)
        total = torch.zeros((), device=device)
        for part, piece in enumerate(noise[rank * share:][:share].split(micro)):
            asked = time.perf_counter()
            images, labels, bad = next(stream)
            waited += time.perf_counter() - asked
            for name in bad.keys() - named:
                print(f"unreadable, its neighbour stands in: {name} ({bad[name]})", file=sys.stderr)
            named |= bad.keys()
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            if smoothing and isinstance(data, Folder):
                torch.default_generator.manual_seed(seed_of(args.seed, "mix", done, rank, part))
                images, labels = mix(images / 255, labels)
            seen = observe(images) if teacher else ()
            run.require_backward_grad_sync = part == parts - 1  # of DDP, as its no_sync() does
            with torch.autocast(device.type, dtype, enabled=amp != "off"):
                loss = run(images, *seen, noise=piece)
            if not teacher:
                loss = F.cross_entropy(loss.float(), labels, label_smoothing=smoothing)
            # 0·inf = NaN: a loss that is not finite leaves no finite gradient on any rank
            scaler.scale(loss / parts * (health + 0 * loss.detach())).backward()
            total += loss.detach() / parts / world
        if world > 1:
            dist.all_reduce(total)
        scaler.unscale_(optimiser)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(optimiser)  # takes none if a gradient is not finite
        scaler.update()
        optimiser.zero_grad()
        # once NaN, health makes all later gradients NaN: no step is taken until the host looks
        health = health + 0 * (total if amp == "fp16" else total + norm)
        meter, done = meter + total * health, done + 1
        saves, fresh = done % args.save_every == 0 or done == steps, done - logged
        if not saves and done % LOG_EVERY:
            continue
        loss, taken = meter.item() / fresh, time.perf_counter() - since
        if not math.isfinite(loss):
            raise FloatingPointError(f"non-finite loss or gradient in steps {logged + 1} to "
                                     f"{done}, lr {lr:.3g}; {out}/last.pt is of before them")
        record = dict(step=done, epoch=done / epoch, loss=loss, lr=lr, grad_norm=norm.item(),
                      images_per_s=fresh * batch / taken, data_wait=waited / taken,
                      unreadable=len(named))
        rounds = [at // (args.eval_every * epoch) for at in (logged, done)]
        if val and (rounds[0] < rounds[1] or done == steps):
            record |= evaluate(model, bank, val, args, device)
            model.train()
        if rank == 0 and record.get("top1", 0) > best:
            best = record["top1"]
            write(out / "best.pt", lambda file: torch.save(model.state_dict(), file))
        bar.set_postfix_str(" ".join(f"{k} {value:.3g}" for k, value in record.items()), False)
        bar.update(fresh)
        if rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(record) + "\n")
        if rank == 0 and saves:
            save()
        meter, logged, waited, since = meter * 0, done, 0.0, time.perf_counter()
    return model, teacher, bank, val, record

def demo(args):  # a teacher with labels, a student without
    train(parse(["--task", "finetune", "--out", f"{args.out}/teacher", "--seed", str(args.seed)]))
    args.teacher_weights, args.out = f"{args.out}/teacher/student.pt", f"{args.out}/student"
    model, teacher, bank, val, record = train(args)
    torch.manual_seed(args.seed)
    device, untrained = model.align.matrix.device, vit(args.student).eval()
    untrained = knn(untrained.to(device), bank, val, args, device)
    taught = knn(lambda images: teacher(images)[0], bank, val, args, device)
    print(f"k-NN {KNN}, mean patch token: untrained student {untrained:.1f} %, "
          f"trained student {record['knn']:.1f} %, teacher {taught:.1f} %")

def parse(argv):
    """A command line -> all arguments, with the task's defaults. Raises ValueError if it is bad."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.print_usage = lambda file: None  # an error is one line
    parser.add_argument("--task", choices=list(RECIPES)[:3], default="pretrain")
    for key, values in dict(zip(COLUMNS, zip(*RECIPES.values())), **COMMON).items():
        first = values[0] if isinstance(values, tuple) else values
        kind = int if key == "workers" else type("" if first is None else first)
        options = dict(type=kind, choices=CHOICES.get(key), help=f"default {values}")
        options = dict(action=argparse.BooleanOptionalAction) if key == "compile" else options
        parser.add_argument("--" + key.replace("_", "-"), **options)
    args = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    digits = args.get("data", COMMON["data"]).startswith("digits")
    demo = dict(DIGITS, teacher_weights="openai" if "teacher" in args else None) if digits else {}
    recipe = dict(zip(COLUMNS, RECIPES["digits" if digits else args["task"]]))
    args = argparse.Namespace(**COMMON | recipe | demo | args)
    for key in ("batch_size", "micro_batch", "epochs", "eval_every", "save_every", "layer_decay"):
        if not 0 < vars(args)[key] <= (1 if key == "layer_decay" else math.inf):
            raise ValueError(f"--{key.replace('_', '-')} {vars(args)[key]} is out of range")
    args.workers = min(16, os.cpu_count()) if args.workers is None else args.workers
    return args

def main(argv=None):
    """Run a command line in this process. Errors of use are one line and exit code 2."""
    logging.disable(logging.ERROR)  # open_clip logs what its exceptions say, too
    try:
        args = parse(argv)
        if "RANK" in os.environ and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
            atexit.register(dist.destroy_process_group)
        (demo if args.task == "pretrain" and args.teacher_weights is None else train)(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: error: {' '.join(str(error).split())[:500]}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error

if __name__ == "__main__":
    main()
