"""Simulates an accelerator, to show where our code mixes devices and what makes the host wait.

It simulates a device `simgpu:0`, torch's PrivateUse1 backend, whose tensors wrap CPU tensors. In `simulated()`:

- an operation on tensors of both devices raises. As on a card, a CPU tensor without dimensions may take part, and an
  index on the CPU is copied over;
- a copy from one device to the other, and an operation whose result the host must wait for (`item()`, `nonzero()`, a
  boolean index, ...), is counted with the line that asked for it: the innermost one outside torch. The backward pass
  has no such line, so its operations count for `backward`;
- numbers, random ones too, are the CPU's: a fit on `simgpu` has the weights of the same fit on the CPU.

What it cannot simulate: time, streams and graphs; kernels and their rounding, cuDNN (an LSTM runs cell by cell) and
autocast; the card's own random generator; locations in files (a tensor is saved as the CPU's, and its copy is counted);
several devices; fastai's typed tensors, which lose their type on the device; waits inside a kernel's own code.

Importing this file makes `simgpu` the accelerator of the process for good: see tests/test_simgpu.py.
"""
import sys
from collections import Counter
from contextlib import contextmanager
from linecache import getline
from pathlib import Path
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
backend_registration._setup_privateuseone_for_python_backend('simgpu')
device = torch.device('simgpu', 0)

seen = Counter() # copies and reads since `simulated()` began: from (kind, line) to how many

class SimTensor(torch.Tensor):
    "The CPU tensor `cpu_tensor` under the name of the simulated device"
    @staticmethod
    def __new__(cls, x):
        form = {} if x.is_sparse else dict(strides=x.stride(), storage_offset=x.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, layout=x.layout, device=device, **form)

    def __init__(self, x): self.cpu_tensor = x
    def __repr__(self): return f'SimTensor({self.cpu_tensor})'
    def as_subclass(self, cls): return self # fastai's types stay behind
    def __reduce_ex__(self, protocol): return self.detach().cpu().__reduce_ex__(protocol)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

class _Simulation(TorchDispatchMode):
    "Sees the operations that have no `SimTensor` among their arguments, such as `torch.zeros(3, device=device)`"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

_apply = torch.nn.Module._apply

def _swapping_apply(self, fn, recurse=True):
    "A moved parameter stays the object it was, as on a card: ties and optimizers hold"
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try: return _apply(self, fn, recurse)
    finally: torch.__future__.set_swap_module_params_on_conversion(before)

@contextmanager
def simulated():
    "Simulate the device; gives `seen`, emptied"
    seen.clear()
    torch.nn.Module._apply = _swapping_apply
    try:
        with _Simulation(): yield seen
    finally: torch.nn.Module._apply = _apply

def _line():
    "The innermost line outside torch and this file"
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path!=__file__ and '/torch/' not in path and not path.startswith('<'):
            return f"{'/'.join(Path(path).parts[-2:])}:{frame.f_lineno} {getline(path, frame.f_lineno).strip()}"
        frame = frame.f_back
    return 'backward'

def lines(kind):
    "How many of `kind` (`'to card'`, `'to host'` or `'read'`) each line asked for"
    return {line:n for (k,line),n in seen.items() if k==kind}

# A card's kernel for these tells the host how large the result is, or what it is
_reads = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
          aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
          aten.repeat_interleave.Tensor, aten.bincount.default}

def _is_read(func, args):
    indices = args[1] if func is aten.index.Tensor else []
    return func in _reads or any(i is not None and i.dtype in (torch.bool,torch.uint8) for i in indices)

_indexing = aten.index.Tensor,aten.index_put_.default,aten.index_put.default,aten._index_put_impl_.default

def _check_devices(func, args, tensors):
    "What a card refuses; the copy of an index is counted"
    on_cpu = [t for t in tensors if not isinstance(t, SimTensor)]
    mixed = [t for t in on_cpu if t.ndim]
    if func in _indexing and isinstance(args[0], SimTensor):
        indices = [i for i in args[1] if any(i is t for t in mixed)]
        mixed = [t for t in mixed if not any(i is t for i in indices)]
        for _ in indices: seen['to card',_line()] += 1
    if func._schema.is_mutable and on_cpu and args[0] is on_cpu[0]: mixed.append(args[0])
    if not mixed: return
    shape = tuple(mixed[0].shape)
    raise RuntimeError(f'Expected all tensors to be on the same device: {func} of simgpu:0 and cpu, {shape}')

def _lstm_cell(from_input, from_hidden, cx, input_bias=None, hidden_bias=None):
    gates = from_input + from_hidden
    if input_bias is not None: gates = gates + input_bias + hidden_bias
    i,f,g,o = gates.chunk(4, 1)
    i,f,g,o = i.sigmoid(),f.sigmoid(),g.tanh(),o.sigmoid()
    cy = f*cx + i*g
    return o*cy.tanh(),cy,torch.cat([i,f,g,o], 1)

def _lstm_cell_backward(d_hy, d_cy, cx, cy, gates, has_bias):
    i,f,g,o = gates.chunk(4, 1)
    tanh = cy.tanh()
    d_hy = torch.zeros_like(cy) if d_hy is None else d_hy
    d_c = d_hy*o*(1-tanh**2)
    if d_cy is not None: d_c = d_c + d_cy
    d_gates = torch.cat([d_c*g*i*(1-i), d_c*cx*f*(1-f), d_c*i*(1-g**2), d_hy*tanh*o*(1-o)], 1)
    return d_gates,d_c*f,d_gates.sum(0) if has_bias else None

# What runs on a card alone
_kernels = {aten._thnn_fused_lstm_cell.default:_lstm_cell,
            aten._thnn_fused_lstm_cell_backward_impl.default:_lstm_cell_backward}

def _is_ours(where): return where is not None and torch.device(where).type=='simgpu'

def _run(func, args, kwargs):
    "`func` on the CPU tensors inside, after the checks and the counts"
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    from_card = any(isinstance(t, SimTensor) for t in tensors)
    if not from_card and not _is_ours(kwargs.get('device')): return func(*args, **kwargs)
    to_card = True
    if func is aten._to_copy.default: to_card = _is_ours(kwargs.get('device', device if from_card else 'cpu'))
    elif func is aten.copy_.default: from_card,to_card = (isinstance(o, SimTensor) for o in (args[1], args[0]))
    elif from_card: _check_devices(func, args, tensors)
    if func in (aten._to_copy.default, aten.copy_.default):
        if from_card!=to_card: seen['to card' if to_card else 'to host', _line()] += 1
    elif _is_read(func, args): seen['read', _line()] += 1
    return _on_cpu(func, args, kwargs, to_card)

def _on_cpu(func, args, kwargs, to_card):
    wrappers = {id(t.cpu_tensor):t for t in tree_leaves((args, kwargs)) if isinstance(t, SimTensor)}
    args,kwargs = tree_map(lambda o: o.cpu_tensor if isinstance(o, SimTensor) else o, (args, kwargs))
    if _is_ours(kwargs.get('device')): kwargs['device'] = torch.device('cpu')
    res = _kernels.get(func, func)(*args, **kwargs)
    def wrap(o):
        if not isinstance(o, torch.Tensor): return o
        if id(o) in wrappers: return wrappers[id(o)] # an operation in place returns its argument
        return SimTensor(o) if to_card else o
    return tree_map(wrap, res)

def _register():
    "`torch.tensor(..., device=device)` bypasses Python's dispatch: give the backend the two operations that it uses"
    library = torch.library.Library('aten', 'IMPL', 'PrivateUse1')
    for name,op in dict(empty_strided=aten.empty_strided.default, copy_=aten.copy_.default).items():
        library.impl(name, lambda *args, op=op, **kwargs: _run(op, args, kwargs))
    return library

_library = _register() # kept, or its kernels go with it
