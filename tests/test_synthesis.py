"The loop that writes responses, on tiny random models of many families: the tokens of `generate`, and the states of one forward pass over the finished text"
import pytest, torch
from test_faults import tiny_tokenizer, tree
from transformers import AutoConfig, AutoModelForCausalLM

from distill_nb.attention import AttentionDistiller
from distill_nb.cache import build_cache
from distill_nb.distiller import Distiller
from distill_nb.loss import DistillationLoss, forward_kl
from distill_nb.relations import attention_loss, relation_loss
from distill_nb.stages import self_distill
from distill_nb.student import add_lora
from distill_nb.synthesis import TeacherSynthesizer, attention_of, inside, pad, trim
from distill_nb.watch import both_logits

torch.set_num_threads(1)
BASE = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=96, initializer_range=.3, pad_token_id=0, bos_token_id=None, eos_token_id=0)
WINDOW = dict(sliding_window=8, layer_types=['sliding_attention', 'full_attention'])
FAMILIES = dict(llama={}, qwen3={}, mistral=dict(sliding_window=8), phi3={}, gemma2=dict(final_logit_softcapping=5., **WINDOW), gemma3_text=WINDOW, gpt2={},
    gpt_neox={}, granite=dict(logits_scaling=6.), cohere=dict(logit_scale=.25), opt=dict(ffn_dim=48, word_embed_proj_dim=32), phi={})

def family(kind, attention='eager'):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **FAMILIES[kind]}), attn_implementation=attention)
    return TeacherSynthesizer(model, tokenizer=tiny_tokenizer(), device='cpu')

def prompts():
    g = torch.Generator().manual_seed(0)
    some = [[9, 8, 7]+torch.randint(1, 259, (n,), generator=g).tolist() for n in (20, 1, 7, 7, 12)]
    return some+some[2:3]

@pytest.mark.parametrize('kind', FAMILIES)
def test_same_tokens_as_generate(kind):
    t,ids = family(kind),prompts()
    x,mask = pad(ids, 0, left=True)
    first = t.model.generate(input_ids=x, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)[:,x.shape[1]:]
    end = first[1,5].item()
    t.model.generation_config.eos_token_id = end
    exs = t.generate(ids, max_new_tokens=24, temperature=0, batch_size=8, progress=False, capture=True, layers=(1,))
    assert [e['input_ids'][e['prompt_len']:] for e in exs]==[trim(o, {end}) for o in first.tolist()]
    assert min(len(e['hidden']) for e in exs)<24
    for e in exs:
        s = t.score(torch.tensor([e['input_ids']]), layers=(1,))
        for ours,theirs in ((e['hidden'], s['head_input']), (e['layers'][1], s['hidden_states'][1])):
            theirs = theirs[0, e['prompt_len']-1:-1]
            assert ours.shape==theirs.shape and (ours-theirs).abs().max()<1e-3

def test_a_row_has_its_own_luck():
    "A row is drawn alike whether its company is done early or never"
    t,ids = family('llama', 'sdpa'),prompts()
    def write(end):
        t.model.generation_config.eos_token_id = end
        return [e['input_ids'] for e in t.generate(ids, max_new_tokens=12, temperature=1., seed=3, progress=False)]
    whole = write(-1)
    some = write(whole[1][len(ids[1])+2])
    assert whole==write(-1) and len(some[1])==len(ids[1])+3 and {len(a)-len(b) for a,b in zip(whole, ids)}=={12}
    assert all(a==b[:len(a)] for a,b in zip(some, whole))

def test_a_long_prompt_does_not_cut_off_its_company():
    "Each row ends at its own context, and writes what it writes alone"
    t,ids = family('llama', 'sdpa'),[*prompts()[:2], [9, 8, 7]*30, [9, 8, 7]*31+[5, 6]]
    t.model.generation_config.eos_token_id = -1
    write = lambda ids: [e['input_ids'] for e in t.generate(ids, max_new_tokens=24, temperature=0, progress=False)]
    said = write(ids)
    assert [len(a)-len(b) for a,b in zip(said, ids)]==[24, 24, 6, 1]
    assert said==[o for i in ids for o in write([i])]

WIDTHS = {k: (32, 16, 16) for k in FAMILIES}|{k: (32, 32, 32) for k in ('gpt2', 'gpt_neox', 'opt')}

@pytest.mark.parametrize('kind', FAMILIES)
def test_inside_of_every_family(kind):
    "Queries, keys and values that, put through the family's own attention, are what the family makes of them; maps that are its own"
    t,x = family(kind),torch.tensor([prompts()[0]])
    with torch.no_grad(), inside(t.model, (0, -1), 1) as seen: maps = t.model(x, output_attentions=True).attentions
    assert tuple(seen[k].shape[-1] for k in 'qkv')==WIDTHS[kind]
    for k,i in ((0, 0), (-1, 1)): assert (seen[f'attention.{k}']-maps[i].mean(1)).abs().max()<1e-6
    attn,got = attention_of(t.model, 1),{}
    out = next(m for n,m in attn.named_children() if n in ('o_proj', 'out_proj', 'c_proj', 'dense'))
    hook = out.register_forward_pre_hook(lambda _, args: got.update(y=args[0]))
    with torch.no_grad(): t.model(x)
    hook.remove()
    v = seen['v'].view(*x.shape, -1, 8).transpose(1, 2)
    y = (maps[1]@v.repeat_interleave(4//v.shape[1], 1)).transpose(1, 2).flatten(2)
    assert (y-got['y'].view(y.shape)).abs().max()<1e-4

def test_losses_from_the_cache(tmp_path):
    "Relation and attention losses against what the cache holds are those against the teacher at hand, over response tokens"
    t,s = family('qwen3'),family('llama')
    c = build_cache(t, ['Say a.', 'Say b and c.', 'No.'], tmp_path/'c', max_new_tokens=9, temperature=1., attention=(1,), relations=1, progress=False)
    b = c.collate([c[i] for i in range(3)])
    pos = b['labels']!=-100
    def hear(m):
        with torch.no_grad(), inside(m.model, (1,), 1) as seen: m.model(b['input_ids'], attention_mask=b['attention_mask'])
        return seen
    own,student = hear(t),hear(s)
    for k in 'qkv':
        ours,theirs = (relation_loss(student[k], o, 2, pos) for o in (b['teacher_relations'][k].float(), own[k]))
        assert ours.shape==pos.shape and theirs.sum()>.1 and (ours-theirs).abs().max()<2e-2*theirs.max()
    ours,theirs = (attention_loss(student['attention.1'], o)[pos] for o in (b['teacher_attention'][1], own['attention.1']))
    assert theirs.mean()>1e-2 and (ours-theirs).abs().max()<1e-2*theirs.max()

@pytest.mark.parametrize('codec', [dict(dtype='fp16'), dict(codec='transform', nats=1e-3)], ids=['fp16', 'transform'])
@pytest.mark.parametrize('kind', ['gemma2', 'granite', 'cohere', 'phi'])
def test_what_comes_after_the_head_reaches_the_loss(tmp_path, kind, codec):
    "A cap, a factor, a bias: the loss from cached hidden states is that from the model's own logits"
    t,s = family(kind),family('llama').model
    if kind=='phi': torch.nn.init.normal_(t.model.lm_head.bias)
    if kind=='gemma2': t.model.config.final_logit_softcapping = 1.
    c = build_cache(t, [dict(prompt=f'Say {o}.', response=o*(9+i)) for i,o in enumerate('abcdefgh')], tmp_path/'c', progress=False, **codec)
    b = c.collate([c[i] for i in range(8)])
    pos,x = b['labels']!=-100,dict(input_ids=b['input_ids'], attention_mask=b['attention_mask'])
    with torch.no_grad(): own,z = (o(**x).logits[pos] for o in (t.model, s))
    d = Distiller(s, c, DistillationLoss(2., 1.))
    with torch.no_grad(): got,bare = d(b)['loss'].item(),c.head.weight.float()@b['teacher_hidden'].float().T
    want = 4*forward_kl(z, own, 2.).mean().item()
    assert abs(got/want-1)<2e-2
    assert forward_kl(both_logits(d, b)[1], own).mean()<5e-3
    if kind in ('gemma2', 'phi'): assert abs(4*forward_kl(z, bare.T, 2.).mean().item()/want-1)>.1

def test_a_capped_student_as_its_own_teacher(tmp_path):
    t,s = family('qwen3'),family('gemma2').model
    s.config.final_logit_softcapping = 1.
    c = build_cache(t, ['Say a.', 'Say b and c.'], tmp_path/'c', max_new_tokens=9, temperature=1., progress=False)
    d = self_distill(s, c, tmp_path/'own', DistillationLoss(2., 1.), mix=1., dtype='fp16')
    with torch.no_grad(): o = d(c.collate([c[0], c[1]]))
    assert o['loss']<1e-3<o['kl'].mean()

def test_students_of_all_families_learn_attention(tmp_path):
    "Maps and relations of another family's teacher reach the student's projections, those of adapters too"
    t = family('qwen3')
    c = build_cache(t, [dict(prompt=f'Say {o}.', response=o*(3+i)) for i,o in enumerate('abcd')], tmp_path/'c', attention=(1,), relations=1, progress=False)
    b = c.collate([c[i] for i in range(4)])
    learns = lambda m: AttentionDistiller(m, c, DistillationLoss(1., 0.), {1: 1}, 1, 2)
    for kind in FAMILIES:
        m = family(kind).model.requires_grad_(True)
        if kind=='gpt2':
            with pytest.raises(ValueError, match='attn_pdrop=0'): learns(m)
            continue
        o = learns(m)(b)
        o['loss'].backward()
        assert (o['feature']/o['n']>.1)==(kind!='qwen3') and o['feature']>=0, kind
        assert [p for p in attention_of(m, 1).parameters() if p.grad is not None and p.grad.any()], kind
    m = add_lora(family('llama').model, 2, 4.)
    o = learns(m)(b)
    o['loss'].backward()
    got = {n.split('.')[-4] for n,p in m.named_parameters() if 'layers.1.self_attn' in n and 'lora_B' in n and p.grad is not None and p.grad.any()}
    assert got=={'q_proj', 'k_proj', 'v_proj'}

def test_a_teacher_on_disk_makes_the_same_cache(tmp_path):
    "Weights read again at each pass, and far fewer passes where batches are packed by tokens"
    near = family('llama', 'sdpa')
    near.model.save_pretrained(tmp_path/'model')
    kw = dict(dtype=torch.float32, tokenizer=near.tokenizer, device='cpu', attn_implementation='sdpa')
    away = TeacherSynthesizer(tmp_path/'model', device_map='auto', max_memory=dict(cpu='1KB'), offload_folder=tmp_path/'off', **kw)
    near = TeacherSynthesizer(tmp_path/'model', **kw)
    assert {p.device.type for p in away.model.parameters()}=={'meta'} and {p.device.type for p in near.model.parameters()}=={'cpu'}
    rows,passes = [dict(prompt=f'Say {c}.', response=c*9) for c in 'abcdefgh'],[]
    hook = away.model.model.layers[0].register_forward_pre_hook(lambda *a: passes.append(1))
    for tokens in (20, 4096):
        n,how = len(passes),dict(shard_size=8, score_tokens=tokens, dtype='int8', layers=(1,), relations=0, progress=False)
        for k,t in dict(away=away, near=near).items(): assert build_cache(t, rows, tmp_path/f'{k}{tokens}', **how).verify()==[]
        assert tree(tmp_path/f'away{tokens}')==tree(tmp_path/f'near{tokens}')
        passes[n:] = [len(passes)-n]
    hook.remove()
    assert passes==[8+3, 1+3]
