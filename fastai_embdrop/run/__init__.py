"The training command, from files to `embdrop-train`"
import warnings
with warnings.catch_warnings():
    # from torch 2.14 on, fastai.layers, which everything here imports, meets the end of `torch.jit.script`
    warnings.filterwarnings('ignore', r'.*torch\.jit\.', FutureWarning)
    import fastai.layers
