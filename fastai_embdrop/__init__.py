"""Embedding dropout that drops whole words, at any vocabulary size, and its annealing, for fastai and PyTorch

Modules:

- `fastai_embdrop.dropout`: Drop whole words from an embedding: one draw per vocabulary row, shared by the whole batch
- `fastai_embdrop.embeddings`: Whole-row dropout, in place, for the embeddings of a model that you already have
- `fastai_embdrop.schedules`: Functions that set `embed_p` over a training run: fastai's schedules, four from the
  literature, and shapes by name
- `fastai_embdrop.anneal`: A Learner callback that moves `embed_p`, or any dropout probability, while a model trains
- `fastai_embdrop.loss`: A language model's training step that never holds its logits
- `fastai_embdrop.awdlstm`: fastai's language model with its dropout defects mended, under the same names and with the
  same weights
- `fastai_embdrop.adapt`: A callback that finds `embed_p` while the model trains
- `fastai_embdrop.run.files`: Read weights, words and text safely, write files whole, and lock the folder of a run
- `fastai_embdrop.run.corpus`: Text to train on, read and tokenized in memory
- `fastai_embdrop.run.settings`: The settings of a training run: a dataclass, a file and flags that agree
- `fastai_embdrop.run.checkpoint`: A killed fit resumes from its last checkpoint and, on a CPU, ends with the same bits
  as an uninterrupted one
- `fastai_embdrop.run.distrib`: Train a language model on several GPUs or in several CPU processes: each process reads
  its own rows and draws its own masks, and all share one `embed_p`
- `fastai_embdrop.run.folder`: The folder of a run: what is in it, and how it is checked, written and loaded
- `fastai_embdrop.run.train`: `embdrop-train`: a language model on real text, with embedding dropout that can change
  during the training"""

__version__ = "0.1.0"
