"""Time the inference of a model beside that of its plain ViT, and what it really ran beside what that costs.

python tools/benchmark.py configs/dyt/vitti_cifar100_1k.py [CHECKPOINT] --rate 0.5 0.7 --batch 1 8 32 [--json FILE]
"""

import argparse
import copy
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # else torch's profiler, which tells the memory, says when it starts

from mmdyt import compat

compat.install()

import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from mmengine.utils import ProgressBar
from torch.utils.data import DataLoader

from mmdyt import preflight
from mmdyt.core.observe import dynamic_branches
from mmdyt.engine.benchmark.accuracy import method_names, points, read_comparison
from mmdyt.engine.benchmark.break_even import break_even, count_break_even_rounds
from mmdyt.engine.benchmark.images import Images, generated_images, pool_size, real_images
from mmdyt.engine.benchmark.measure import count_rounds, measure
from mmdyt.engine.benchmark.report import machine, table
from mmdyt.engine.benchmark.request import DEVICES, DTYPES, RULES, TIMED, BenchmarkRequest
from mmdyt.engine.benchmark.variants import Build, Variant, build_variants
from mmdyt.engine.comparison_plot import plot_latency
from mmdyt.engine.host import find_host, is_recognizer
from mmdyt.files import check_out_file, write_json
from mmdyt.preflight.checkpoints import check_exists, pretrained_cfgs
from mmdyt.preflight.datasets import nested, option
from mmdyt.preflight.fingerprint import versions

LOADER = 'test_dataloader'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Time forward passes of a model (adapter), of its plain ViT (dense) and of the dispatched model '
        '(dyt). They take turns on the same images, other ones in each round. See docs/benchmarks.md.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; without one the gates are random')
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 8], help='images of a pass, or views of clips')
    parser.add_argument('--device', nargs='+', default=[], help=f'{", ".join(DEVICES)}; default: cuda if it is there')
    parser.add_argument('--dtype', nargs='+', default=['fp32'], help=', '.join(DTYPES))
    parser.add_argument('--rate', nargs='+', type=float, default=[], help='activation rates to set on the images')
    parser.add_argument('--rule', help=f'of --rate: {", ".join(RULES)}; default: the first that works')
    parser.add_argument('--inference', nargs='+', default=[], help='executors: auto, packed, fixed, masked')
    parser.add_argument('--dispatch', nargs='+', default=[], help='mlp, attn, attn_mlp, layer; not with a checkpoint')
    parser.add_argument('--keys', nargs='+', default=[], help='active, all; not with a checkpoint')
    parser.add_argument('--part', default=TIMED[0], help=f'what is timed: {", ".join(TIMED)}')
    parser.add_argument('--compile', action='store_true', help='time each variant under torch.compile, too')
    parser.add_argument('--cuda-graphs', action='store_true', help='time each variant as one CUDA graph, too')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='default: that of the test images')
    parser.add_argument('--rounds', type=int, default=20, help='timed passes of each variant')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch on a CPU')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results')
    parser.add_argument('--accuracy', type=Path, metavar='FILE', help='compare.json of tools/compare.py, for --plot')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw accuracy against latency')
    parser.add_argument('--write-break-even', type=Path, metavar='FILE', help='find out at which rate skipping pays')
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def check_request(args: argparse.Namespace) -> BenchmarkRequest:
    """What the user asks for; refuses what cannot be, before anything is built."""
    if bool(args.accuracy) != bool(args.plot):
        raise ValueError(f'--plot must come with --accuracy, got {args.plot} and {args.accuracy}.')
    if args.accuracy:
        read_comparison('--accuracy', args.accuracy)
    for name in ('json', 'write_break_even', 'plot'):
        if getattr(args, name):
            check_out_file(f'--{name.replace("_", "-")}', getattr(args, name))
    for name in ('dispatch', 'keys'):
        if args.checkpoint and getattr(args, name):
            raise ValueError(
                f'--{name} must be left out with a checkpoint, which was trained with one, got {getattr(args, name)}.'
            )
    names = ('batch', 'device', 'dtype', 'rate', 'inference', 'dispatch', 'keys')
    words = {name: tuple(getattr(args, name)) for name in names}
    plain = {name: getattr(args, name) for name in ('rounds', 'threads', 'seed', 'shape', 'part')}
    return BenchmarkRequest(
        **words, **plain, rule=args.rule or RULES[0], compiled=args.compile, cuda_graphs=args.cuda_graphs
    )


def load(args: argparse.Namespace) -> tuple[Config, Build, str]:
    """The checked config, what builds its model, and where the weights come from."""
    cfg = preflight.load_config(args)
    if args.checkpoint:
        check_exists('checkpoint', args.checkpoint)
    cfg.load_from = args.checkpoint
    preflight.check(cfg, loops=())
    bases = [init_cfg.get('checkpoint') for _, init_cfg in pretrained_cfgs(cfg.model, 'model')]
    there = bool(bases) and all(Path(path).expanduser().is_file() for path in bases)
    weights = 'checkpoint' if args.checkpoint else 'base' if there else 'random'
    return cfg, partial(build, cfg, args.checkpoint, there, args.seed), weights


def build(cfg: Config, checkpoint: str | None, pretrained: bool, seed: int, **changes) -> nn.Module:
    """The config's model with other arguments of its backbone.

    Args:
        cfg: The checked config.
        checkpoint: Of the unchanged model.
        pretrained: Whether the frozen base of the config is loaded where there is no checkpoint.
        seed: Of random weights.
        **changes: Arguments of the backbone; a changed model takes its weights from the unchanged one.
    """
    set_random_seed(seed)
    model = copy.deepcopy(cfg.model)
    model.backbone.update(changes)
    host = find_host(MODELS.build(model))
    if not changes and checkpoint:
        load_checkpoint(host, checkpoint, map_location='cpu', logger='silent')
    elif not changes and pretrained:
        host.init_weights()
    return host


def get_images(cfg: Config, host: nn.Module, request: BenchmarkRequest) -> Images:
    """Those of the test set if its files are there, else generated ones."""
    number = pool_size(request.batch, request.rounds)
    shape = request.shape and tuple(request.shape)
    try:
        loader = test_loader(cfg)
    except FileNotFoundError as error:
        print(f'Generated images: {error}', flush=True)
        frames = view_frames(cfg) if is_recognizer(host) else None
        return generated_images(host, number, shape, frames, request.seed)
    return real_images(host, loader, number, shape, request.seed)


def test_loader(cfg: Config) -> DataLoader:
    """Of the test set, which must be there: nothing is downloaded."""
    if cfg.get(LOADER) is None:
        raise FileNotFoundError(f'config has no {LOADER}.')
    preflight.check_images(cfg, [LOADER])
    loader = copy.deepcopy(cfg[LOADER]) | dict(batch_size=1, num_workers=0, persistent_workers=False)
    fetching = [dataset for _, dataset in nested(loader['dataset'], LOADER) if option(dataset, 'download') is True]
    for dataset in fetching:
        dataset['download'] = False
    try:
        return Runner.build_dataloader(loader)
    except RuntimeError as error:
        if not fetching:
            raise
        raise FileNotFoundError(str(error).strip().splitlines()[0]) from error


def view_frames(cfg: Config) -> int:
    """Frames of a view, as the test pipeline samples them."""
    steps = (cfg.get(LOADER) or {}).get('dataset', {}).get('pipeline') or []
    frames = next((step['clip_len'] for step in steps if step.get('clip_len')), None)
    if frames is None:
        raise ValueError(f'{LOADER}.dataset.pipeline must have a step with a clip_len, got none.')
    return frames


def method_word(args: argparse.Namespace) -> str | None:
    """The method as tools/compare.py is told it; None is the config's."""
    options = [f'{key}={value}' for key, value in (args.method_options or {}).items()]
    return ','.join([args.method, *options]) if args.method else None


def about(
    args: argparse.Namespace, cfg: Config, host: nn.Module, request: BenchmarkRequest, images: Images, weights: str
) -> dict:
    """What the results depend on."""
    return dict(
        command=sys.argv,
        config=args.config,
        method=method_word(args),
        methods=method_names(host.backbone, method_word(args)),
        checkpoint=args.checkpoint,
        weights=weights,
        gates=None if not dynamic_branches(host) else 'checkpoint' if args.checkpoint else 'random',
        images=images.source,
        image_count=len(images.pool),
        part=request.part,
        rule=request.rule if request.rate else None,
        rounds=request.rounds,
        threads=request.threads,
        seed=request.seed,
        machine=machine(),
        versions=versions(cfg),
    )


def draw(args: argparse.Namespace, result: dict) -> None:
    """The accuracy that a comparison found against the latency, and a word on each variant that is left out."""
    comparison = read_comparison('--accuracy', args.accuracy)
    panels, left_out = points(result, comparison)
    for word in left_out:
        print(f'Not in the plot: {word}.')
    if panels:
        plot_latency(panels, comparison.get('metric'), args.plot)
        print(f'Drawn to {args.plot}.')


def check_dispatched(args: argparse.Namespace, host: nn.Module) -> None:
    """Refuse options about dispatchers where there are none."""
    for name in ('rate', 'inference', 'dispatch', 'keys', 'write_break_even'):
        if (given := getattr(args, name)) and not dynamic_branches(host):
            option = f'--{name.replace("_", "-")}'
            raise ValueError(f'{option} must be left out for a model without dispatchers, got {given}.')


def with_defaults(args: argparse.Namespace, request: BenchmarkRequest, host: nn.Module) -> BenchmarkRequest:
    """The request with the rate and the rule that the model's dispatchers allow, where the user named none."""
    dispatchers = [branch.dispatcher.decider for branch in dynamic_branches(host).values()]
    if args.rule is None and not all(dispatcher.per_token for dispatcher in dispatchers):
        request = replace(request, rule='threshold')
    if any(dispatcher.adjustable for dispatcher in dispatchers) and not request.rate and not args.checkpoint:
        request = replace(request, rate=(getattr(host, 'target_rate', 0.5),))
    return request


def time_all(
    args: argparse.Namespace, request: BenchmarkRequest, variants: list[Variant], images: Images, known: dict
) -> dict:
    """Time, print, and write what is known and the rows; what is done is kept, whatever comes."""
    bar, result = ProgressBar(count_rounds(request), file=sys.stderr), known | dict(rows=[], failed=[])
    for rows, failed in measure(variants, images, request, bar.update):
        result['rows'] += rows
        result['failed'] += failed
        if args.json:
            write_json(args.json, result)
    print(f'\n\n{table(result)}')
    for one in result['failed']:
        where = f'{one["variant"]} on {one["device"]}, {one["dtype"]}, batch {one["batch"]}'
        print(f'{where}: failed, {one["reason"]}', file=sys.stderr)
    return result


def main() -> None:
    """Check everything the user typed, then time, print and write."""
    args = parse_args()
    with preflight.clean_exit():
        request = check_request(args)
        cfg, builder, weights = load(args)
        host = builder()
        check_dispatched(args, host)
        request = with_defaults(args, request, host)
        images = get_images(cfg, host, request)
        trained = bool(args.checkpoint)
        variants = build_variants(builder, request, images.pool, trained)
    known = about(args, cfg, host, request, images, weights)
    result = time_all(args, request, variants, images, known)
    if args.plot:
        draw(args, result)
    if args.write_break_even:
        bar = ProgressBar(count_break_even_rounds(request), file=sys.stderr)
        found = break_even(builder, request, images, trained, bar.update)
        write_json(args.write_break_even, known | found)
        print(f'\n\nBreak-even: --cfg-options model.backbone.break_even={found["break_even"]:.3f}')
    preflight.end_cpu_processes()


if __name__ == '__main__':
    main()
