import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def version() -> str:
    scope = {}
    exec((HERE / 'mmdyt' / '__init__.py').read_text(), scope)
    return scope['__version__']


class BuildWithConfigs(build_py):
    """Puts configs and tools where OpenMMLab's packages have theirs; an editable install finds them in the clone."""

    def run(self) -> None:
        target = Path(self.build_lib, 'mmdyt')
        if self.editable_mode or target.resolve() == (HERE / 'mmdyt').resolve():
            super().run()
            return
        shutil.rmtree(target, ignore_errors=True)  # build/ outlives files that there are no more
        super().run()
        for folder in ('configs', 'tools'):
            for path in (HERE / folder).rglob('*'):
                if path.suffix in ('.py', '.sh'):
                    self.mkpath(str((target / '.mim' / path.relative_to(HERE)).parent))
                    self.copy_file(str(path), str(target / '.mim' / path.relative_to(HERE)))


# The wheels do not name all that they import: mmpretrain needs torchvision, mmseg needs ftfy and regex.
cls = ['mmpretrain==1.2.*', 'torchvision']
seg = [*cls, 'mmsegmentation==1.2.*', 'ftfy', 'regex']
video = [*cls, 'mmaction2==1.2.*']  # brings decord, which has wheels for x86-64 Linux and Windows only
pyav = ['av>=14']  # reads video, too, and has wheels for macOS and ARM as well
convert = ['safetensors']
# Where tests get weights from. In an environment of its own: mmaction2 1.2 does not import beside transformers 5.
weights = [*convert, 'timm', 'transformers>=5', 'open_clip_torch']
docs = ['sphinx', 'myst-parser', 'furo']  # the pages in docs/ as a site; releases that go together want Python 3.11
export = ['onnx', 'onnxscript', 'onnxruntime']  # ONNX files: written, run and quantised

setup(
    name='mmdyt',
    version=version(),
    description='Dynamic Tuning (DyT) of frozen Vision Transformers for OpenMMLab',
    license='Apache-2.0',
    cmdclass=dict(build_py=BuildWithConfigs),
    entry_points=dict(console_scripts=['mmdyt = mmdyt.__main__:main']),
    packages=find_packages(include=['mmdyt', 'mmdyt.*']),
    package_data={f'mmdyt.engine.{name}': ['*.html', '*.css', '*.js'] for name in ('report', 'visualize')},
    # mmengine 0.10.7 uses pkgutil.find_loader, which Python 3.14 dropped.
    python_requires='>=3.10,<3.14',
    install_requires=[
        'mmengine>=0.10.7,<0.11',
        'numpy',
        'setuptools<81',  # mmengine 0.10.7 reads pkg_resources, which later releases no longer ship
        'torch>=2.6',
    ],
    extras_require={
        'cls': cls,
        'seg': seg,
        'video': video,
        'pyav': pyav,
        'convert': convert,
        'export': export,
        'docs': [f'{name}; python_version >= "3.11"' for name in docs],
        'weights': weights,
        # Whoever has the compiled mmcv keeps it: no other extra asks for mmcv.
        'lite': ['mmcv-lite>=2.0,<2.2'],
        'test': [*convert, *pyav, *export, 'pytest', 'pytest-xdist', 'ruff'],
        'all': sorted({*cls, *seg, *video, *pyav, *convert, *export}),
    },
)
