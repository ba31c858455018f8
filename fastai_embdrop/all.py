"Everything public, to be imported after `from fastai.text.all import *`"
from .dropout import *
from .awdlstm import *
from .anneal import *
from .corpus import *

