"""Sources, packing and the stateless loader. Knows nothing of JAX models."""

if __name__ != "isthmus.data":  # imported from a checkout as plain `data`
  from isthmus.pallas.checkout import alias

  alias(__name__)
else:
  from importlib.metadata import version

  from isthmus.data.augment3d import Augment3D
  from isthmus.data.brats import BratsFolder
  from isthmus.data.digits import Digits
  from isthmus.data.image import ImageFolder
  from isthmus.data.library import PythonLibrary
  from isthmus.data.loader import Loader
  from isthmus.data.mnist import FashionMnist, Mnist5k
  from isthmus.data.npz import Npz
  from isthmus.data.permutation import permute
  from isthmus.data.photos import Photographs
  from isthmus.data.source import Arrays, ArraySource, Dataset, Source
  from isthmus.data.text import Text, TextFiles
  from isthmus.data.tfds import Tfds
  from isthmus.data.tokenizer import Bytes, Tokenizer
  from isthmus.data.video import VideoClips
  from isthmus.data.volume import BrainVolume, NiftiFolder

  __version__ = version("isthmus")
  __all__ = [
    "ArraySource",
    "Arrays",
    "Augment3D",
    "BrainVolume",
    "BratsFolder",
    "Bytes",
    "Dataset",
    "Digits",
    "FashionMnist",
    "ImageFolder",
    "Loader",
    "Mnist5k",
    "NiftiFolder",
    "Npz",
    "Photographs",
    "PythonLibrary",
    "Source",
    "Text",
    "TextFiles",
    "Tfds",
    "Tokenizer",
    "VideoClips",
    "permute",
  ]
