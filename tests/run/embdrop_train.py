"The command, for tests that start it under torchrun; rank 1 kills itself at batch `KILL_AT`."
import os, signal, sys
from fastai.callback.core import Callback
from fastai.torch_core import defaults, rank_distrib
from fastai_embdrop.run.train import main

class Killed(Callback):
    def before_batch(self):
        due = self.training and self.train_iter==int(os.environ['KILL_AT'])
        if due and rank_distrib()==1: os.kill(os.getpid(), signal.SIGKILL)

if __name__=='__main__':
    defaults.callbacks.append(Killed)
    sys.exit(main())
