"What users meet. Import it after `from fastai.text.all import *`: then `AWD_LSTM` and its configurations are ours"
from .dropout import EmbeddingDropout
from .embeddings import add_embedding_dropout, remove_embedding_dropout
from .schedules import SchedCurriculum, SchedEarly, SchedLate, SchedPiecewise, shapes
from .anneal import AnnealDropMult, AnnealEmbedP, DropoutScheduler, drop_attrs, find_dropouts
from .loss import without_logits
from .awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_learner, awd_lstm_lm, awd_lstm_lm_config
from .adapt import AdaptEmbedP
from .run.files import load_weights
from .run.corpus import Corpus, lm_dataloaders, read_corpus, tokenize
from .run.settings import Settings
from .run.checkpoint import Checkpoint, last_checkpoint
from .run.folder import classifier_from_lm, load_run
from .run.train import train_lm
