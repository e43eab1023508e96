"""Checkpoints, work dirs, resuming and tools' files."""

import math

import spoil
import torch
from case import refused, stops, works

LAST = 'run/last.pth'


def _drop(*keys):
    return lambda content: {key: value for key, value in content.items() if key not in keys}


def _poison(value):
    def change(content):
        tensors = [t for t in content['state_dict'].values() if t.is_floating_point()]
        tensors[len(tensors) // 2].view(-1)[0] = value

    return change


def _reshape(content):
    name = next(name for name in content['state_dict'] if 'adapter' in name)
    content['state_dict'][name] = content['state_dict'][name][..., :-1]


def _less(pattern):
    def change(content):
        state = content['state_dict']
        content['state_dict'] = {name: value for name, value in state.items() if pattern not in name}

    return change


def _more(content):
    content['state_dict']['backbone.no_such.weight'] = torch.zeros(3)


BROKEN = [
    ('zero bytes', spoil.content(LAST, b''), ('last.pth',)),
    ('text', spoil.content(LAST, b'not a checkpoint'), ('last.pth',)),
    ('html', spoil.content(LAST, b'<html>404</html>' * 50), ('last.pth',)),
    ('cut at 0.1', spoil.cut(LAST, 0.1), ('last.pth',)),
    ('cut at 0.99', spoil.cut(LAST, 0.99), ('last.pth',)),
    ('a list', spoil.checkpoint('a list', lambda content: [1, 2], LAST), ('last.pth',)),
    ('no tensors', spoil.checkpoint('no tensors', lambda content: {}, LAST), ('last.pth',)),
    ('not a number', spoil.checkpoint('not a number', _poison(math.nan), LAST), ('last.pth',)),
    ('infinite', spoil.checkpoint('infinite', _poison(math.inf), LAST), ('last.pth',)),
    ('another shape', spoil.checkpoint('another shape', _reshape, LAST), ('adapter',)),
    ('without adapters', spoil.checkpoint('without adapters', _less('.adapter.'), LAST), ('adapter',)),
    ('without a head', spoil.checkpoint('without a head', _less('head'), LAST), ('head',)),
    ('a folder', spoil.both(spoil.remove(LAST), spoil.content(f'{LAST}/x', b'')), ('last.pth',)),
]

CHECKPOINTS = [
    *(
        refused('checkpoint', f'{command} {world} {target}', *says, change=change)
        for world in ('seg', 'cls')
        for command, target in (('test', '{run}/last.pth'), ('train', '--resume {run}/last.pth'))
        for _, change, says in BROKEN
    ),
    *(
        refused('checkpoint', 'calibrate cls {run}/last.pth {out}.pth --target-rate 0.5', *says, change=change)
        for _, change, says in BROKEN
    ),
    refused('checkpoint', 'test seg {run}/last.pth', 'no_such', change=spoil.checkpoint('one more', _more, LAST)),
    *(
        refused('checkpoint', 'train seg', 'pretrained.pth', change=change)
        for change in (
            spoil.content('../pretrained.pth', b''),
            spoil.content('../pretrained.pth', b'no weights'),
            spoil.cut('../pretrained.pth', 0.5),
            spoil.checkpoint('not a number', _poison(math.nan), '../pretrained.pth'),
            spoil.checkpoint(
                'another net', lambda content: dict(state_dict=dict(w=torch.zeros(2))), '../pretrained.pth'
            ),
        )
    ),
    *(
        refused(
            'resume',
            f'train {world} --resume {{run}}/last.pth',
            part,
            change=spoil.checkpoint(f'no {part}', _drop(part), LAST),
        )
        for world in ('seg', 'cls')
        for part in ('optimizer', 'param_schedulers', 'message_hub', 'meta')
    ),
    works(
        'checkpoint',
        'test cls {run}/last.pth',
        change=spoil.checkpoint('bare weights', lambda c: c['state_dict'], LAST),
    ),
    works('checkpoint', 'test seg {run}/last.pth', change=spoil.checkpoint('no optimizer', _drop('optimizer'), LAST)),
    works(
        'resume',
        'train cls --resume {run}/epoch_1.pth',
        check=lambda here, out: (here.parent / 'out/epoch_2.pth').exists(),
    ),
    works('resume', 'train seg --resume {run}/iter_3.pth'),
    works('resume', 'train cls --resume', check=lambda here, out: (here.parent / 'out/epoch_2.pth').exists()),
    works(
        'resume',
        'train cls --resume {run}/epoch_1.pth --cfg-options optim_wrapper.optimizer.lr=0.5',
        check=lambda here, out: 'lr' in out and '0.5' in out,
    ),
]


def _in_work_dir(name, change, command='train cls --work-dir {run} --resume', expected=works, **more):
    return expected('work dir', command, change=spoil.named(name, change), **more)


def _empty_pointer(here):
    (here / 'run/last_checkpoint').write_text('')


def _no_pointer(here):
    (here / 'run/last_checkpoint').unlink()
    (here / 'run/epoch_2.pth').unlink()


def _elsewhere(here):
    (here / 'run/epoch_2.pth').unlink()
    (here / 'run/last_checkpoint').write_text('/gone/elsewhere/epoch_1.pth')


def _moved(here):
    _elsewhere(here)
    (here / 'run').rename(here.parent / 'moved')
    (here / 'run').mkdir()


FILES = [
    works('work dir', 'train cls --resume --work-dir {root}/moved', spoil.named('a moved folder', _moved)),
    refused('work dir', 'train cls --work-dir {root}/pretrained.pth', 'work'),
    refused('work dir', 'train cls --work-dir {root}/pretrained.pth/deep', 'pretrained.pth'),
    refused('work dir', 'test cls {ckpt} --work-dir {root}/pretrained.pth', 'work'),
    refused('work dir', 'train cls --work-dir /proc/no', '/proc/no'),
    refused('file', 'test cls {ckpt} --dump {here}', 'dump'),
    refused('file', 'test cls {ckpt} --dump {here}/predictions.txt', 'dump'),
    refused('file', 'test cls {ckpt} --show-dir {ckpt}', 'show-dir'),
    refused('file', 'get_flops cls --json {here}', 'json'),
    refused('file', 'get_flops cls --json /proc/no/x.json', '/proc/no'),
    refused('file', 'calibrate cls {ckpt} {here} --target-rate 0.5', 'out'),
    refused('file', 'calibrate cls {ckpt} /proc/no/x.pth --target-rate 0.5', '/proc/no'),
    works('file', 'calibrate cls {ckpt} {out} --target-rate 0.5'),
    works('file', 'calibrate cls {ckpt} {out}.pth'),
    refused('file', 'calibrate cls {ckpt} {out}.pth --target-rate 1.5', 'target-rate;target_rate'),
    refused('file', 'calibrate cls {ckpt} {out}.pth --target-gmacs 0', 'gmacs'),
    refused('file', 'calibrate cls {ckpt} {out}.pth --target-gmacs 99', 'gmacs'),
    refused('file', 'calibrate cls {ckpt} {out}.pth --target-rate 0.5 --batches -1', 'batches'),
    refused('file', 'calibrate cls {ckpt} {out}.pth --target-rate 0.5 --rule no', 'rule'),
    works('file', 'calibrate cls {ckpt} {out}.pth --target-rate 0.5 --rule global'),
    works('file', 'get_flops cls --json {out}.json'),
]

TOOLS = [
    refused('tool', 'convert_vit - {root}/no.pth {out}.pth', 'no.pth'),
    refused('tool', 'convert_vit - {root}/pretrained.pth {out}.txt', '.pth'),
    refused('tool', 'convert_vit - {root}/pretrained.pth {out}.pth', 'backbone.cls_token'),
    refused('tool', 'convert_vit - {root}/pretrained.pth {root}/pretrained.pth', 'pretrained.pth'),
    refused('tool', 'convert_vit - {root}/w.bin {out}.pth', 'w.bin', change=spoil.content('w.bin', b'')),
    refused(
        'tool',
        'convert_vit - {root}/w.safetensors {out}.pth',
        'w.safetensors',
        change=spoil.content('w.safetensors', b'abc'),
    ),
    refused('tool', 'get_flops seg --shape 0 64', 'shape'),
    refused('tool', 'get_flops seg --shape -64 64', 'shape'),
    refused('tool', 'get_flops seg --rate 1.5', 'rate'),
    refused('tool', 'get_flops seg --rate -0.1', 'rate'),
    refused('tool', 'get_flops seg --rate nan', 'rate'),
    refused('tool', 'get_flops seg --frames 4', 'frames'),
    refused('tool', 'get_flops video --frames 0', 'frames'),
    works('tool', 'get_flops seg --shape 65 97'),
    works('tool', 'get_flops video --frames 4 --rate 0'),
    refused('tool', 'compare cls --methods', 'methods'),
    refused('tool', 'compare cls --methods lorra', 'lorra'),
    refused('tool', 'compare cls --methods lora lora', 'lora'),
    refused('tool', 'compare cls --methods lora,rnk=4', 'rnk'),
    refused('tool', 'compare cls --methods lora,rank=0', 'rank'),
    refused('tool', 'compare cls --methods lora --seeds 1 1', 'seeds'),
    refused('tool', 'compare cls --methods lora --seeds one', 'seeds'),
    refused('tool', 'compare cls --methods lora --rounds 0', 'rounds'),
    refused('tool', 'compare cls --methods lora --work-dir {root}/pretrained.pth', 'work-dir'),
    refused('tool', 'vtab vtab --root {here}/no', 'no'),
    refused('tool', 'vtab vtab --root {here}/root --tasks cifr', 'cifr'),
    refused('tool', 'vtab vtab --root {here}/root --tasks sun397', 'sun397'),
    refused('tool', 'vtab cls --root {here}', 'vtab'),
    refused('tool', 'benchmark_training - no.py', 'no.py'),
    refused('tool', 'benchmark_training cls --rounds 0', 'rounds'),
    refused('tool', 'benchmark_training cls --threads 0', 'threads'),
    refused('tool', 'benchmark_training cls --methods lorra', 'lorra'),
    refused('tool', 'check_clips cls', 'clip'),
    refused('tool', 'check_clips video --workers 0', 'workers'),
    refused('tool', 'check_clips video --frames 0', 'frames'),
    works('tool', 'check_clips video --frames 2'),
]

METHODS = [
    *(
        refused('method', f'train {world} --method {command}', *says)
        for world in ('seg', 'cls')
        for command, says in (
            ('lorra', ('lorra', 'lora')),
            ('lora+', ('method',)),
            ('LORA', ('lora',)),
            ('lora+lora', ('lora',)),
            ('lora --method-options rank=0', ('rank',)),
            ('lora --method-options rank=-8', ('rank',)),
            ('lora --method-options rank=2.5', ('rank',)),
            ('lora --method-options rank=True', ('rank',)),
            ('lora --method-options rnk=8', ('rnk',)),
            ('lora --method-options on=attn.qvk', ('qvk',)),
            ('lora --method-options rows=x', ('rows',)),
            ('lora --method-options layers=[9]', ('layers',)),
            ('lora --method-options layers=[]', ('layers',)),
            ('ssf --method-options official=maybe', ('official',)),
            ('ether --method-options blocks=5', ('blocks',)),
            ('vpt_deep --method-options length=-1', ('length',)),
            ('vpt_deep --method-options dropout=2', ('dropout',)),
            ('adapter_plus --method-options bottleneck=0', ('bottleneck',)),
            ('dyt --method-options target_rate=2', ('target_rate',)),
            ('dyt --method-options dispatch=mpl', ('dispatch',)),
            ('evidence --method-options hooks.0.begin=2', ('begin',)),
            ('evidence --method-options hooks.9.begin=0.1', ('hooks',)),
            ('dyt --method-options adapter.type=mmdyt.LoRA', ('adapter;LoRA',)),
        )
    ),
    refused('method', 'train cls --method-options rank=4', 'method'),
    refused('method', 'test cls {ckpt} --method lora', 'lora'),
    *(
        works('method', f'train {world} --method {word}')
        for world in ('seg', 'cls', 'video')
        for word in ('linear', 'full', 'bitfit', 'lora+evidence', 'ssf+dyt', 'ether_plus', 'vpt_deep', 'adapter_plus')
    ),
]

DIVERGING = [
    stops('diverging', f'train {world} --cfg-options {option}', 'loss', 'finite')
    for world in ('seg', 'cls', 'video')
    for option in (
        'optim_wrapper.optimizer.lr=1e30',
        'optim_wrapper.optimizer.type=SGD optim_wrapper.optimizer.lr=1e38 optim_wrapper.optimizer._delete_=True',
    )
]


FULL = (('FILE_LIMIT', '100000'),)  # bytes that a file may hold, as on a disk that is full
DISK = [
    stops('disk', 'calibrate cls {ckpt} {ckpt} --target-rate 0.5', 'epoch_2.pth', env=FULL),
    stops('disk', 'calibrate cls {ckpt} {out}.pth --target-rate 0.5', 'out.pth', env=FULL),
    stops('disk', 'train cls', 'epoch_1.pth', env=FULL),
    stops('disk', 'train seg', 'iter_3.pth', env=FULL),
    stops('disk', 'train cls --work-dir {run} --resume {run}/epoch_1.pth', 'epoch_2.pth', env=FULL),
]

POINTERS = [
    _in_work_dir('an empty last_checkpoint', _empty_pointer),
    _in_work_dir('no last_checkpoint', _no_pointer),
    _in_work_dir('a last_checkpoint of elsewhere', _elsewhere),
]

CASES = CHECKPOINTS + POINTERS + FILES + TOOLS + METHODS + DIVERGING + DISK
