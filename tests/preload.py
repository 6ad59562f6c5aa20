"""What the server in conftest.py imports before it forks: what scripts import or build on first use, and few of our modules."""
import contextlib
import importlib
import os
import sys

NAMES = '''
    torch torch._dynamo torch.distributed torch.utils.serialization torch.utils.flop_counter torch.profiler._cupti_monitor
    numpy.ctypeslib numpy.ma numpy.random safetensors.torch yaml tqdm pytest forked
    PIL.Image PIL.ImageDraw PIL.ImageFont PIL.ImageOps PIL.PngImagePlugin PIL.JpegImagePlugin
    matplotlib.backends.backend_agg matplotlib.figure mpl_toolkits.mplot3d
    pyarrow.parquet scipy.stats sklearn.metrics tokenizers galore_torch
    transformers transformers.models.auto.modeling_auto transformers.models.distilbert.modeling_distilbert
    common optim readers.tokens
'''
for name in NAMES.split():
    with contextlib.suppress(ImportError):     # a script that needs it imports it, or says that it is missing
        importlib.import_module(name)
with contextlib.suppress(ImportError):
    from transformers import conversion_mapping
    conversion_mapping.get_checkpoint_conversion_mapping('distilbert')      # a thousand regular expressions, built once
if 'BYTECODE' in os.environ:        # forks compile our modules once, outside the checkout, also with PYTHONDONTWRITEBYTECODE
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ['BYTECODE']
