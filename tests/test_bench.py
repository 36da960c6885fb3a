"Benchmarks are run by hand, on a machine with nothing else to do; here is only seen that they run, at sizes that say nothing"
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1]/'bench'
SCRIPTS = sorted(p.name for p in BENCH.glob('*.py'))

def bench(name, *args):
    r = subprocess.run([sys.executable, str(BENCH/name), *args], capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    assert r.returncode==0, r.stderr[-2000:]
    return r.stdout

@pytest.mark.parametrize('kind', ["plain cross-entropy", "ours, teacher's hidden states and head", 'ours, top-k with bucket and cross-entropy'])
def test_loss(kind):
    o = json.loads(bench('loss.py', '--tokens', '64', '--hidden', '16', '--vocab', '512', '--k', '8', '--threads', '1', '--one', kind).splitlines()[-1])
    assert o['s']>0 and o['mib']>=0

@pytest.mark.parametrize('kind', ['plain', 'hidden', 'hidden, selective', 'topk'])
def test_train(kind):
    o = json.loads(bench('train.py', '--layers', '1', '--batch', '1', '--lengths', '16', '--one', kind).splitlines()[-1])
    assert o['s']>0 and o['mib']>0

def test_resident(): assert re.search(r'^BAR .* ok$', bench('resident.py', '--mib', '320', '--no-write'), re.M)

@pytest.mark.parametrize('name', [n for n in SCRIPTS if n!='peers.py'])
def test_help_says_what_is_measured(name): assert 'usage:' in bench(name, '--help')
