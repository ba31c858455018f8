"""Runs README.md's first Python example with the package that is installed: `python tools/first_example.py`

The example is the Python blocks of the first section that has any. It runs in an empty folder, away from the sources.
"""
import os, re, tempfile
from pathlib import Path

readme = Path(__file__).parent.parent/'README.md'

def first_example(text):
    "The Python code of the first section of the Markdown `text` that has any"
    sections = re.split(r'^##+ ', text, flags=re.M)
    blocks = [re.findall(r'^```\s*python\n(.*?)^```', s, re.M | re.S) for s in sections]
    return '\n'.join(next(filter(None, blocks)))

if __name__=='__main__':
    code = first_example(readme.read_text())
    os.chdir(tempfile.mkdtemp())
    exec(compile(code, readme.name, 'exec'))
    import fastai_embdrop
    print(f'ran {len(code.splitlines())} lines of {readme.name} with {fastai_embdrop.__file__}')
