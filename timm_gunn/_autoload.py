"""Makes timm find the models of timm_gunn by name, without an import of timm_gunn.

PyTorch calls arm() at the end of `import torch` (entry-point group `torch.backends`, which is meant for device
backends). timm may be half imported then, so arm() only leaves a hook for the import system, which registers the models
each time `timm.models` has been executed. Nothing in here may break an import of torch or timm. So this file is
installed beside the package, as `_timm_gunn_autoload`. Editable installs hold a copy: after a change, install again.

TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches all entry points of the group off; `import timm_gunn` registers the models too.
If PyTorch raises an error because this module is gone, install timm-gunn or uninstall it: that was not finished.
"""
import sys

_TARGET = 'timm.models'


class _Hook:
    """Finder of `timm.models` that wraps the loader which other finders come up with."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TARGET:
            return None
        # importlib.util.find_spec() would wait for the lock of timm, which a thread that waits for this one may hold.
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, 'find_spec', None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                if hasattr(spec.loader, 'exec_module'):
                    spec.loader = _Loader(spec.loader)
                else:
                    _warn(f'timm-gunn cannot follow the import of timm by {spec.loader!r}: import timm_gunn instead')
                return spec
        return None


class _Loader:
    """Runs another loader, then registers the models. The module keeps the other loader as its own."""

    def __init__(self, loader):
        self.loader = loader

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name):  # create_module, is_package, get_source, ...
        return getattr(self.loader, name)


def _register():
    try:
        ours, timms = (
            getattr(sys.modules.get(name), 'register_model', None) for name in ('timm_gunn.gunn', _TARGET))
        if ours not in (None, timms):  # of a timm that has been dropped
            import importlib
            del sys.modules['timm_gunn.gunn']
            importlib.reload(sys.modules['timm_gunn'])
        import timm_gunn  # noqa: F401
    except Exception as e:
        version = getattr(sys.modules.get('timm'), '__version__', 'of unknown version')
        where = f'with timm {version} (it needs 1.0.22 or newer)'
        if isinstance(e, ModuleNotFoundError) and e.name == 'timm_gunn':
            where = 'without its package (install or uninstall it again)'
        _warn(f'timm-gunn could not register its models {where}: {type(e).__name__}: {e}')


def _warn(message):
    import warnings
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # warnings are errors here, and ours must not become one
        print(f'RuntimeWarning: {message}', file=sys.stderr)


def arm():
    """Register the models once timm.models has been executed, before or from now on."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
