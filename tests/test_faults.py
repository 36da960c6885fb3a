"""What happens to a cache when things go wrong: the tests that a notebook has no room for

| what goes wrong | where it is tested |
|---|---|
| 1. kill -9 inside write, fsync and rename | `test_killed_at_any_point_and_resumed`, `test_killed_while_the_plan_grows`, `test_leftovers_are_swept`, `test_flushed_then_renamed` |
| 2. SIGTERM or keyboard interrupt | `test_interrupted_in_the_middle_of_a_shard`, `test_terminated` |
| 3. a shard cut short | `test_cut_short_is_named_and_repaired`; chapter 00c, Tensors |
| 4. a bit flipped in a shard | `test_a_flipped_bit_in_a_shard_is_found_before_its_rows` |
| 5. a bit flipped in a sidecar or the manifest | `test_a_flipped_bit_in_json_names_the_file` |
| 6. a shard or sidecar missing | `test_a_lost_file_is_made_again`; the codec: `test_no_shard_of_a_lost_codec_is_left`; chapter 00e, Interrupted |
| 7. disk full | `test_disk_full`, `test_disk_full_at_the_tokenizer`, `test_a_disk_that_is_really_full`; the estimate: chapter 00e |
| 8. read-only folder | `test_read_only_folder`, with and without a lock file that could be taken |
| 9. two writers | `test_second_writer_and_dead_writer`; several processes of one job: `test_two_processes_make_the_same_cache` and the two after it |
| 10. wrong tokenizer | `test_wrong_tokenizer` |
| 11. wrong teacher | `test_wrong_teacher_lists_the_keys` |
| 12. prompts changed or appended | `test_edited_prompt_is_named`; appended and moved: chapter 00e |
| 13. NaN or infinity from the teacher | `test_nan_names_the_prompt`, `test_one_number_that_is_not_finite`, `test_nan_skipped_and_recorded`; chapter 00f |
| 14. values beyond fp16 | chapter 00d (`_codes`) |
| 16. empty prompt | chapters 00 and 00d (`encode`, `as_rows`); one without tokens: `test_a_prompt_without_tokens` |
| 17. prompt longer than the context | chapters 00 and 00d (`generate`, `fitting`) |
| 18. pad == eos | `test_learns_to_stop`; labels: chapter 00e, Reading |
| 19. padded vocabularies, other tokenizers | `test_pairs_that_cannot_be_compared`; chapter 01a |
| 20. token id outside the vocabulary | `test_shard_that_does_not_fit_is_refused`, `test_ids_of_a_sparse_store_lie_in_the_vocabulary` |
| 21. older and newer schema | chapter 00e, manifest and repair |
| 22. a pickle in place of a shard, codec or model | `test_pickle_never_runs` |
| 23. names and links that lead elsewhere | `test_links_out_of_the_folder`, `test_nothing_is_written_through_a_link`; names: chapter 00e, manifest |
| 29. attention maps on fast attention | chapters 00 (`inside`) and 00e, Reading (`build_cache`) |
| 30. teacher not frozen or shared | `test_teacher_is_the_same_after_training`; refused: `test_pairs_that_cannot_be_compared` |
| 32. no network | `test_no_network`; chapter 00 |
| 33. code that comes with a model | `test_code_in_a_cache_never_runs`, `test_code_of_a_model_never_runs`; chapter 00 |
"""
import errno, json, os, pickle, random, re, shutil, signal, socket, subprocess, sys, tempfile, threading, time
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import distill_nb.cache as dc, distill_nb.files as df
from distill_nb.cache import TeacherCache, build_cache, repair_cache, shard_path
from distill_nb.files import CacheError, Job, load_json, save_json, save_tensors
from distill_nb.sparse import CODECS, high_bits, pack_ids, unpack_ids
from distill_nb.synthesis import TeacherSynthesizer, sha256_file, weights_sha256
from distill_nb.vision import ImageTeacher, auto_class

torch.set_num_threads(1)
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
ROWS = [dict(prompt=f'Say {c} and {c}.', split='train') for c in 'abcdefghijkl']
KW = dict(max_new_tokens=4, temperature=1., shard_size=2, progress=False)

def tiny_tokenizer(merges=(('a', 'n'), ('an', 'd')), **special):
    vocab = {c: i for i,c in enumerate(['<end>', *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a+b for a,b in merges)])}
    t = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    t.pre_tokenizer,t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False),decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t, **{'eos_token': '<end>', 'pad_token': '<end>', **special})

def tiny_model(seed=0, **kw):
    torch.manual_seed(seed)
    shape = dict(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=.3, pad_token_id=0, bos_token_id=None, eos_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **kw}))

def tiny_teacher(model=None, tok=None): return TeacherSynthesizer(model or tiny_model(), tokenizer=tok or tiny_tokenizer(), device='cpu')

@pytest.fixture(scope='module')
def teacher(): return tiny_teacher()

@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
    "A cache that nobody disturbed"
    d = tmp_path_factory.mktemp('whole')/'cache'
    build_cache(teacher, ROWS, d, **KW)
    return d

@pytest.fixture
def cut(whole, tmp_path): return Path(shutil.copytree(whole, tmp_path/'cache'))

@pytest.fixture
def unasked(teacher, monkeypatch):
    "From here on, asking the teacher is a failure"
    def asked(*a, **k): raise AssertionError('the teacher was asked')
    monkeypatch.setattr(teacher, '_write', asked, raising=False)

def tree(d): return {str(p.relative_to(d)): sha256_file(p) for p in sorted(d.rglob('*')) if p.is_file() and not p.name.startswith('.lock')}

def flip(p, byte, bit=0):
    b = bytearray(p.read_bytes())
    b[byte] ^= 1<<bit
    p.write_bytes(b)

def forked(f):
    "Run `f` in a child process; returns its pid"
    pid = os.fork()
    if pid: return pid
    try: f()
    except BaseException as e:
        os.write(2, f'{type(e).__name__}: {e}\n'.encode())
        os._exit(1)
    os._exit(0)

def stop(*a, **k): raise KeyboardInterrupt

def status(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

class Reaper:
    "Kills its own process at the `n`-th event of a kind: in the middle of a write, before an fsync or a rename, after a rename"
    def __init__(self, kind, n, say): self.kind,self.n,self.say = kind,n,say

    def due(self, kind):
        self.n -= kind==self.kind
        if self.n==0: os.write(self.say, kind.encode()+b' ')
        return self.n==0

    def die(self): os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, f, kind, half=None):
        def g(*a, **k):
            if self.due(kind):
                if half: half(f, *a, **k)
                self.die()
            res = f(*a, **k)
            if kind=='rename' and self.due('renamed'): self.die()
            return res
        return g

    def arm(self):
        def half_file(f, p, b): f(p, b[:len(b)//2])
        def half_tensors(f, t, p):
            f(t, p)
            os.truncate(p, p.stat().st_size//2)
        Path.write_bytes = self.wrap(Path.write_bytes, 'write', half_file)
        df.save_file = self.wrap(df.save_file, 'write', half_tensors)
        os.fsync = self.wrap(os.fsync, 'fsync')
        os.replace = self.wrap(os.replace, 'rename')

def test_killed_at_any_point_and_resumed(teacher, whole, tmp_path):
    rng,kills,points = random.Random(0),0,('write', 'fsync', 'rename', 'renamed')
    r,w = os.pipe()
    for i in range(200):
        d,kind,n = tmp_path/f'after {kills//20}',points[i%4],rng.randrange(1, 8)
        def run():
            if i%5: Reaper(kind, n, w).arm()
            build_cache(teacher, ROWS, d, **KW)
        pid = forked(run)
        if not i%5:
            time.sleep(rng.uniform(.01, .2))
            os.kill(pid, signal.SIGKILL)
        code = status(pid)
        assert code in (0, -signal.SIGKILL)
        kills += code!=0
        if code==0:
            assert tree(d)==tree(whole)
            if kills>=20: break
            shutil.rmtree(d)
    kinds = set(os.read(r, 9999).decode().split())
    assert code==0 and kills>=20 and kinds==set(points), (code, kills, kinds)

@pytest.mark.parametrize('kind', ['write', 'fsync', 'rename', 'renamed'])
def test_killed_while_the_plan_grows(teacher, whole, cut, kind):
    "The plan is that of before or the new one, and never half of it"
    more = [*ROWS, 'Say m and m.']
    def run():
        Reaper(kind, 1, os.open(os.devnull, os.O_WRONLY)).arm()
        build_cache(teacher, more, cut, **KW)
    assert status(forked(run))==-signal.SIGKILL
    assert len(TeacherCache(cut, partial=True))==12
    assert len(build_cache(teacher, more, cut, **KW))==13
    assert {k: v for k,v in tree(cut).items() if k in tree(whole) and k!='manifest.json'}=={k: v for k,v in tree(whole).items() if k!='manifest.json'}

def test_leftovers_are_swept(teacher, whole, cut):
    "Also those of what is whole, each by the process whose work it was"
    left = [cut/f'.{n}.tmp' for n in ('shard-00000.safetensors', 'shard-00003.json', 'codec.safetensors', 'manifest.json')]
    for p in left: p.write_bytes(b'half a file')
    dc._sweep(cut, Job(1, 2, 'a'))
    assert [p.exists() for p in left]==[True, False, True, True]
    build_cache(teacher, ROWS, cut, **KW)
    assert tree(cut)==tree(whole)

def test_flushed_then_renamed(teacher, tmp_path, monkeypatch):
    "What a power cut would show: no name before its bytes are on the disk, and no file counts before its name is"
    said,sync,move = [],os.fsync,os.replace
    def flush(fd):
        said.append(os.fstat(fd).st_ino)
        sync(fd)
    def rename(a, b):
        said.append(b.name)
        move(a, b)
    monkeypatch.setattr(os, 'fsync', flush)
    monkeypatch.setattr(os, 'replace', rename)
    save_tensors(dict(x=torch.zeros(3)), tmp_path/'a.safetensors')
    a,b,d = ((tmp_path/n).stat().st_ino for n in ('a.safetensors', 'a.json', '.'))
    assert said==[a, 'a.safetensors', d, b, 'a.json', d]
    said.clear()
    dc.save_tokenizer(teacher.tokenizer, tmp_path)
    assert set(said)=={o.stat().st_ino for o in (tmp_path/'tokenizer', *(tmp_path/'tokenizer').iterdir())}

def test_the_next_shard_is_asked_for_while_one_is_written(teacher, whole, tmp_path, monkeypatch):
    third,save,write,n = threading.Event(),save_tensors,teacher._write,[0]
    def slow(t, p, *a):
        if p.name=='shard-00001.safetensors': assert third.wait(20), 'nobody asked for shard 2'
        save(t, p, *a)
    def asked(*a):
        n[0] += 1
        if n[0]==3: third.set()
        return write(*a)
    monkeypatch.setattr(dc, 'save_tensors', slow)
    monkeypatch.setattr(teacher, '_write', asked, raising=False)
    build_cache(teacher, ROWS, tmp_path/'c', **KW)
    assert tree(tmp_path/'c')==tree(whole)

def test_interrupted_in_the_middle_of_a_shard(teacher, whole, tmp_path, monkeypatch):
    n,write = [0],df.save_file
    def interrupted(t, p):
        n[0] += 1
        write(t, p)
        if n[0]==4: raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(df, 'save_file', interrupted)
        build_cache(teacher, ROWS, tmp_path/'c', **KW)
    assert n[0]==4 and not list((tmp_path/'c').glob('.*.tmp'))
    def stopped(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(teacher.model.model, 'forward', stopped)
        build_cache(teacher, ROWS, tmp_path/'c', **KW)
    assert not list((tmp_path/'c').glob('.*.tmp')) and not teacher.model.lm_head._forward_pre_hooks
    assert len(TeacherCache(tmp_path/'c', partial=True))==4
    build_cache(teacher, ROWS, tmp_path/'c', **KW)
    assert tree(tmp_path/'c')==tree(whole)

def test_terminated(teacher, whole, tmp_path):
    def slow():
        fill = dc._build_shard
        def shard(*a):
            n = fill(*a)
            time.sleep(.5)
            return n
        dc._build_shard = shard
        build_cache(teacher, ROWS, tmp_path/'c', **KW)
    pid = forked(slow)
    for _ in range(2000):
        if shard_path(tmp_path/'c', 1).exists(): break
        time.sleep(.005)
    os.kill(pid, signal.SIGTERM)
    assert status(pid)==-signal.SIGTERM
    build_cache(teacher, ROWS, tmp_path/'c', **KW)
    assert tree(tmp_path/'c')==tree(whole)

@pytest.mark.parametrize('keep', [lambda n: n-1, lambda n: n//2, lambda n: 0], ids=['a byte', 'half', 'all'])
def test_cut_short_is_named_and_repaired(teacher, whole, cut, keep):
    p = shard_path(cut, 2)
    n,c = p.stat().st_size,TeacherCache(cut)
    times = {o.name: o.stat().st_mtime_ns for o in cut.glob('*.*')}
    os.truncate(p, keep(n))
    with pytest.raises(CacheError, match=rf'shard-00002.safetensors: expected {n} bytes, got {keep(n)}$'): c[4]
    assert c.repair(teacher)==[f'{p}: expected {n} bytes, got {keep(n)}']
    assert tree(cut)==tree(whole)
    assert {o.name for o in cut.glob('*.*') if o.name!='.lock' and times.get(o.name)!=o.stat().st_mtime_ns}=={p.name, p.with_suffix('.json').name}

def test_a_flipped_bit_in_a_shard_is_found_before_its_rows(cut):
    p,rng = shard_path(cut, 1),random.Random(0)
    for _ in range(30):
        where = rng.randrange(p.stat().st_size), rng.randrange(8)
        flip(p, *where)
        c = TeacherCache(cut)
        assert c[0]['index']==0
        for ask in (lambda: c[2], lambda: next(iter(DataLoader(c, 4, collate_fn=c.collate))), c.stats):
            with pytest.raises(CacheError, match='shard-00001.safetensors: expected SHA-256'): ask()
        flip(p, *where)
    assert TeacherCache(cut)[2]['index']==2

@pytest.mark.parametrize('name', ['manifest.json', 'codec.json', 'shard-00001.json'])
def test_a_flipped_bit_in_json_names_the_file(cut, name):
    p,rng = cut/name,random.Random(0)
    for _ in range(60):
        where = rng.randrange(p.stat().st_size), rng.randrange(8)
        flip(p, *where)
        with pytest.raises(CacheError, match=name): TeacherCache(cut)
        flip(p, *where)
    TeacherCache(cut)

@pytest.mark.parametrize('name', ['shard-00003.safetensors', 'shard-00003.json', 'codec.json', 'codec.safetensors', 'tokenizer/tokenizer.json'])
def test_a_lost_file_is_made_again(teacher, whole, cut, name):
    (cut/name).unlink()
    with pytest.raises(CacheError): TeacherCache(cut)
    repair_cache(teacher, cut, ROWS)
    assert tree(cut)==tree(whole)
    assert not TeacherCache(cut).verify()
    if 'tokenizer' in name: return
    (cut/name).unlink()
    build_cache(teacher, ROWS, cut, **KW)
    assert tree(cut)==tree(whole)

@pytest.mark.parametrize('mend', [repair_cache, lambda t, d: build_cache(t, ROWS, d, dtype='int8', **KW)], ids=['repair', 'build'])
def test_no_shard_of_a_lost_codec_is_left(teacher, tmp_path, monkeypatch, mend):
    "Fitted again, a codec may be rounded otherwise: what the old one wrote is made again, whatever comes in between"
    d = build_cache(teacher, ROWS, tmp_path/'c', dtype='int8', **KW).path
    cls,was = CODECS['int8'],TeacherCache(d).codec.channel
    fit = cls.fit
    monkeypatch.setattr(cls, 'fit', staticmethod(wraps(fit)(lambda h, head: fit(3*h, head))))
    flip(d/'codec.safetensors', -1)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(dc, '_pack', stop)
        mend(teacher, d)
    assert TeacherCache(d, partial=True).shards==[] and (TeacherCache(d, partial=True).codec.channel!=was).any()
    mend(teacher, d)
    c = TeacherCache(d)
    assert c.verify()==[] and c.fidelity(teacher, len(ROWS))[1]<.05

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), df.SafetensorError('I/O error: No space left on device (os error 28)')])
def test_disk_full(teacher, whole, tmp_path, monkeypatch, error):
    n,write,d = [0],df.save_file,tmp_path/'c'
    def short(t, p):
        n[0] += 1
        write(t, p)
        if n[0]>3: raise error
    with monkeypatch.context() as m, pytest.raises(CacheError, match=r'shard-00002.safetensors: the disk is full: \d+ bytes needed, \d+ free'):
        m.setattr(df, 'save_file', short)
        build_cache(teacher, ROWS, d, **KW)
    assert not list(d.glob('.*.tmp')) and not list(d.glob('shard-00002*'))
    c = TeacherCache(d, partial=True)
    assert c.shards==[0, 1] and [c[i]['index'] for i in range(4)]==[0, 1, 2, 3]
    build_cache(teacher, ROWS, d, **KW)
    assert tree(d)==tree(whole)

def test_disk_full_at_the_tokenizer(teacher, tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(teacher.tokenizer, 'save_pretrained', full)
    with pytest.raises(CacheError, match='tokenizer: the disk is full'): build_cache(teacher, ROWS, tmp_path/'c', **KW)
    assert not (tmp_path/'c/manifest.json').exists()

def test_a_disk_that_is_really_full(teacher, whole, tmp_path, monkeypatch):
    small = tmp_path/'small'
    small.mkdir()
    if shutil.which('mount') is None or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=96k', 'tmpfs', small], capture_output=True).returncode:
        pytest.skip('a small file system cannot be mounted here')
    try:
        with pytest.raises(CacheError, match=r'up to \d+ bytes needed, \d+ free'): build_cache(teacher, ROWS, small/'c', **{**KW, 'max_new_tokens': 9999})
        (small/'ballast').write_bytes(bytes(20_000))
        monkeypatch.setattr(dc, '_size', lambda *a: dict(bytes=0))
        with pytest.raises(CacheError, match='the disk is full'): build_cache(teacher, ROWS*9, small/'c', **KW)
        assert not list((small/'c').glob('.*.tmp'))
        done = TeacherCache(small/'c', partial=True)
        assert done.shards and [done[i]['index'] for i in range(len(done))]==list(range(2*len(done.shards)))
        (small/'ballast').unlink()
    finally: subprocess.run(['umount', '-l', small], check=True)

def test_read_only_folder(teacher, whole, unasked):
    with tempfile.TemporaryDirectory() as top:
        d = Path(shutil.copytree(whole, Path(top)/'cache'))
        Path(top).chmod(0o755)
        for p in (d, d/'tokenizer'): p.chmod(0o555)
        (d/'.lock').chmod(0o666)
        def guest():
            if os.getuid()==0: os.setuid(65534)
            c = TeacherCache(d)
            assert len(c)==12 and c[5]['hidden'].shape[1]==16 and c.verify()==[]
            for to in (d, d/'deeper', Path(top)/'new'):
                with pytest.raises(CacheError, match='cannot be written'): build_cache(teacher, ROWS, to, **KW)
        if os.getuid(): Path(top).chmod(0o555)
        assert status(forked(guest))==0
        Path(top).chmod(0o755)
        for p in (d, d/'tokenizer'): p.chmod(0o755)

def writer(d, start=forked):
    "A child process, made by `start`, that is writing the cache `d`"
    r,w = os.pipe()
    def hold():
        with dc.claim(d):
            os.write(w, b'.')
            time.sleep(60)
    pid = start(hold)
    os.read(r, 1)
    return pid

def test_second_writer_and_dead_writer(teacher, whole, tmp_path, monkeypatch):
    d = tmp_path/'c'
    pid = writer(d)
    with monkeypatch.context() as m, pytest.raises(CacheError, match=f'process {pid} on {socket.gethostname()} is writing this cache'):
        m.setattr(teacher, 'generate', None, raising=False)
        build_cache(teacher, ROWS, d, **KW)
    os.kill(pid, signal.SIGKILL)
    status(pid)
    build_cache(teacher, ROWS, d, **KW)
    assert tree(d)==tree(whole)

def two(root):
    "Script for torchrun: one cache, by two processes"
    made,build = [],dc._build_shard
    def note(*a):
        made.append(a[3])
        return build(*a)
    dc._build_shard = note
    for name,how in JOBS.items(): assert len(build_cache(tiny_teacher(), ROWS, root/name, **KW, **how))==len(ROWS)*how.get('n_responses', 1)
    (root/f'made by {os.environ["RANK"]}').write_text(str(made))

JOBS = dict(plain={}, transform=dict(codec='transform', nats=1e-2), pairs=dict(n_responses=2))

def test_two_processes_make_the_same_cache(teacher, tmp_path):
    run = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_addr', '127.0.0.1', '--master_port', '29619', __file__, str(tmp_path)]
    res = subprocess.run(run, env=os.environ|dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr[-3000:]
    assert (tmp_path/'made by 0').read_text()==str([0, 2, 4]*2+[0, 2, 4, 6, 8, 10])
    assert (tmp_path/'made by 1').read_text()==str([1, 3, 5]*2+[1, 3, 5, 7, 9, 11])
    for name,how in JOBS.items():
        build_cache(teacher, ROWS, tmp_path/'alone'/name, **KW, **how)
        assert tree(tmp_path/name)==tree(tmp_path/'alone'/name)

def member(rank, f, name='a'):
    "Run `f` in a child process that is one of two of a job"
    def run():
        os.environ.update(RANK=str(rank), WORLD_SIZE='2', TORCHELASTIC_RUN_ID=name, MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
        f()
    return forked(run)

def test_a_job_and_strangers(teacher, whole, tmp_path):
    d = tmp_path/'c'
    first = writer(d, partial(member, 1))
    def refused():
        with pytest.raises(CacheError, match=f'process {first} on {socket.gethostname()} of job a 127.0.0.1 29500 is writing this cache'):
            with dc.claim(d): pass
    def welcome():
        with dc.claim(d): pass
    try:
        refused()
        assert status(member(0, refused, 'b'))==0 and status(member(1, refused))==0 and status(member(0, welcome))==0
    finally:
        os.kill(first, signal.SIGKILL)
        status(first)
    build_cache(teacher, ROWS, d, **KW)
    assert tree(d)==tree(whole)

@pytest.mark.parametrize('dead', [0, 1])
def test_half_of_a_job_dies_and_one_process_goes_on(teacher, whole, tmp_path, dead):
    d = tmp_path/'c'
    def build():
        dc.PATIENCE = 1
        build_cache(teacher, ROWS, d, **KW)
    def doomed():
        Reaper('rename', 3, os.open(os.devnull, os.O_WRONLY)).arm()
        build()
    def left():
        with pytest.raises(CacheError, match=f'process {dead} of the job does not do its part'): build()
    pids = [member(k, doomed if k==dead else left) for k in (0, 1)]
    codes = [status(p) for p in pids]
    assert codes[dead]==-signal.SIGKILL and codes[1-dead]==0
    with pytest.raises(CacheError, match='missing'): TeacherCache(d)
    build_cache(teacher, ROWS, d, **KW)
    assert tree(d)==tree(whole)

def test_repair_is_for_one_process(teacher, cut, monkeypatch):
    for k,v in dict(RANK='0', WORLD_SIZE='2').items(): monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match='repair with one process'): repair_cache(teacher, cut)

other_template = tiny_tokenizer()
other_template.chat_template = '{{ messages[0].content }}!'

@pytest.mark.parametrize('tok', [tiny_tokenizer((('a', 'n'), ('an', 'y'))), tiny_tokenizer((('s', 'a'), ('a', 'y'))), tiny_tokenizer(unk_token='<end>'), other_template],
    ids=['vocabulary', 'merges', 'special tokens', 'chat template'])
def test_wrong_tokenizer(teacher, cut, unasked, tok):
    other = tiny_teacher(tok=tok)
    with pytest.raises(CacheError, match='other settings: teacher.tokenizer'): build_cache(other, ROWS, cut, **KW)
    with pytest.raises(CacheError, match='other settings: teacher.tokenizer'): repair_cache(other, cut)

def eager(m):
    m.set_attn_implementation('eager')
    return m

def changed(**kw):
    m = tiny_model()
    for k,v in kw.items(): setattr(m.config, k, v)
    return m

def repeats(m):
    m.generation_config.repetition_penalty = 1.5
    return m

@pytest.mark.parametrize('model,keys', [(tiny_model(1), 'teacher.weights'), (tiny_model().bfloat16(), 'teacher.dtype, teacher.weights'),
    (eager(tiny_model()), 'teacher.attention'), (changed(rms_norm_eps=1e-3), 'teacher.config'), (repeats(tiny_model()), 'teacher.config')])
def test_wrong_teacher_lists_the_keys(cut, model, keys):
    with pytest.raises(CacheError, match=rf'other settings: {keys}\. Use'): build_cache(tiny_teacher(model), ROWS, cut, **KW)

def test_edited_prompt_is_named(teacher, cut, unasked):
    with pytest.raises(CacheError, match=r'prompts \(prompt 7, in shard 3\)'):
        build_cache(teacher, [*ROWS[:7], dict(ROWS[7], prompt='Say h and H.'), *ROWS[8:]], cut, **KW)
    with pytest.raises(CacheError, match=r'prompts \(prompt 9, in shard 4\)'): build_cache(teacher, ROWS[:9], cut, **KW)
    with pytest.raises(CacheError, match=r'prompts \(prompt 2, in shard 1\)'): build_cache(teacher, [*ROWS[:2], dict(ROWS[2], split='ood'), *ROWS[3:]], cut, **KW)
    with pytest.raises(CacheError, match=r'generation.seed, generation.top_p|generation.top_p, generation.seed'): build_cache(teacher, ROWS, cut, **KW, seed=1, top_p=.9)

def test_nan_names_the_prompt(tmp_path):
    sick = tiny_teacher()
    with torch.no_grad(): sick.model.model.embed_tokens.weight[sick.tokenizer('g').input_ids[0]] = float('nan')
    with pytest.raises(CacheError, match=r"not finite for prompt 6, 'Say g and g\.'"): build_cache(sick, ROWS, tmp_path/'c', **{**KW, 'max_new_tokens': 1})
    assert not shard_path(tmp_path/'c', 3).exists()
    c = TeacherCache(tmp_path/'c', partial=True)
    assert c.shards==[0, 1, 2] and all(c[i]['hidden'].isfinite().all() for i in range(6))

@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_one_number_that_is_not_finite(tmp_path, monkeypatch, value):
    t,n = tiny_teacher(),[0]
    write = t._write
    def sick(*a):
        res,n[0] = write(*a),n[0]+1
        if n[0]==3: res[1][1][-1,5] = float(value)
        return res
    monkeypatch.setattr(t, '_write', sick, raising=False)
    with pytest.raises(CacheError, match=r"not finite for prompt 5, 'Say f and f\.'"): build_cache(t, ROWS, tmp_path/'c', **KW)
    assert TeacherCache(tmp_path/'c', partial=True).shards==[0, 1]

@pytest.mark.parametrize('codec', [{}, dict(codec='topk', k=4, layers=(0, 1), attention=(0,), relations=0)], ids=['written', 'inside'])
def test_nan_skipped_and_recorded(tmp_path, codec):
    sick = tiny_teacher(eager(tiny_model()) if 'attention' in codec else None)
    with torch.no_grad(): sick.model.model.embed_tokens.weight[sick.tokenizer('g').input_ids[0]] = float('nan')
    kw = {**KW, 'max_new_tokens': 1, **codec}
    c = build_cache(sick, ROWS, tmp_path/'c', not_finite='skip', **kw)
    assert len(c)==11 and c.stats()['skipped']==1 and c.verify()==[] and load_json(shard_path(tmp_path/'c', 3).with_suffix('.json'))['meta']['left_out']==[0]
    assert [c[i]['meta']['prompt'] for i in (5, 6, 7)]==[ROWS[i]['prompt'] for i in (5, 7, 8)]
    assert sick.tokenizer.decode(c[6]['input_ids'][:c[6]['prompt_len']])==ROWS[7]['prompt']
    for name in ('input_ids', 'topk.logits' if codec else 'hidden'):
        for e in c:
            x = e[name.split('.')[0]]
            assert (x.logits if '.' in name else x.float()).isfinite().all()
    if codec:
        e = c[6]
        with torch.no_grad(): a = sick.model(e['input_ids'][None], output_attentions=True).attentions[0][0].mean(0)
        assert (e['attention'][0]-a[e['prompt_len']-1:-1]).abs().max()<1e-3
    was = tree(tmp_path/'c')
    shard_path(tmp_path/'c', 3).unlink()
    build_cache(sick, ROWS, tmp_path/'c', not_finite='skip', **kw)
    assert tree(tmp_path/'c')==was
    with pytest.raises(CacheError, match='other settings: not_finite'): build_cache(sick, ROWS, tmp_path/'c', **kw)

def test_every_shard_checks_itself(tmp_path, monkeypatch):
    "A teacher whose states go wrong after the first shard: what it wrote does not agree with what it says when asked again"
    t = tiny_teacher()
    write = t._write
    def later(*a):
        n[0] += 1
        return [(r, h if n[0]<3 else h+3*h.roll(1, 1)) for r,h in write(*a)]
    n = [0]
    monkeypatch.setattr(t, '_write', later, raising=False)
    with pytest.raises(CacheError, match="shard-00002.safetensors: what would be stored is .* nats per token from the teacher's own logits"):
        build_cache(t, ROWS, tmp_path/'c', **KW)
    assert TeacherCache(tmp_path/'c', partial=True).shards==[0, 1]

WRONG = dict(hidden='hidden', full='logits', topk='ids', sampled='ids')

@pytest.mark.parametrize('codec', [*WRONG, 'last row'])
def test_what_goes_to_the_disk_is_what_is_checked(tmp_path, monkeypatch, codec):
    "Rows of another token are found in what was packed, and in every example of the first batch"
    t,pack,name = tiny_teacher(tiny_model(initializer_range=1.)),dc._pack,WRONG.get(codec, 'hidden')
    def wrong(*a):
        res = pack(*a)
        x = res[name].view(torch.int16) if name=='ids' else res[name]
        bad = torch.cat([x[:-1], x[:1]]) if codec=='last row' else x.roll(1, 0)
        return res|{name: bad.view(res[name].dtype)}
    monkeypatch.setattr(dc, '_pack', wrong)
    how = dict(codec=codec) if codec in WRONG else {}
    with pytest.raises(CacheError, match='shard-00000.safetensors: what would be stored is'): build_cache(t, ROWS, tmp_path/'c', **how, **KW)

def test_a_prompt_without_tokens(tmp_path):
    "A mark of no width is no blank, and a tokenizer may know nothing of it"
    tok = tiny_tokenizer()
    tok.backend_tokenizer.normalizer = normalizers.Replace('\u200b', '')
    t = tiny_teacher(tok=tok)
    with pytest.raises(ValueError, match='prompt 1 has no tokens: remove that row'): build_cache(t, ['Say a.', '\u200b'], tmp_path/'c', **KW)

def test_learns_to_stop(teacher, whole):
    c,student = TeacherCache(whole),tiny_model(3, hidden_size=32, num_hidden_layers=2)
    assert c.tokenizer.pad_token_id==c.tokenizer.eos_token_id==0
    ids = [teacher.tokenizer(f'Say {s}').input_ids for s in ('a', 'bb', 'ccc')]
    exs = [dict(input_ids=torch.tensor(x+x[-1:]+[0]), prompt_len=len(x), hidden=torch.zeros(2, 16), layers={}, index=i) for i,x in enumerate(ids)]
    b,opt = c.collate(exs),torch.optim.AdamW(student.parameters(), 1e-2)
    for _ in range(60):
        z = student(b['input_ids'], attention_mask=b['attention_mask']).logits
        loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), b['labels'].flatten(), ignore_index=-100)
        loss.backward()
        opt.step()
        opt.zero_grad()
    said = tiny_teacher(student).generate(ids, max_new_tokens=12, temperature=0, progress=False)
    assert [e['input_ids'] for e in said]==[e['input_ids'].tolist() for e in exs]

def test_pairs_that_cannot_be_compared(teacher):
    from distill_nb.student import check_pair
    t,s,tok = teacher.model,tiny_model(1),tiny_tokenizer()
    assert check_pair(t, s, tok, tok)==259
    with pytest.warns(UserWarning, match='comparing the first 259 ids, the rest is padding'): assert check_pair(t, tiny_model(1, vocab_size=272), tok, tok)==259
    with pytest.raises(ValueError, match='heads of 259 and 250 rows'): check_pair(t, tiny_model(1, vocab_size=250), tok, tok)
    with pytest.raises(ValueError, match='the tokenizers differ in 4 tokens'): check_pair(t, s, tok, tiny_tokenizer((('s', 'a'), ('a', 'y'))))
    plain = tiny_tokenizer()
    plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match='the tokenizers split'): check_pair(t, s, tok, plain)
    thief = tiny_model(1)
    thief.lm_head.weight = t.lm_head.weight
    for a,b,why in ((tiny_model(), s, 'the teacher is trainable'), (tiny_model().requires_grad_(False).train(), s, 'in train mode'), (t, thief, 'shares memory')):
        with pytest.raises(ValueError, match=why): check_pair(a, b, tok, tok)

def shard_with(d, i, **new):
    "Shard `i` with other tensors and a sidecar that fits them"
    p = shard_path(d, i)
    meta = load_json(p.with_suffix('.json'))['meta']
    save_tensors({**load_file(p), **new}, p, meta)

def test_shard_that_does_not_fit_is_refused(cut):
    t = load_file(shard_path(cut, 1))
    for ids,why in ((259, 'lies outside the vocabulary of 259'), (-1, 'lies outside the vocabulary of 259')):
        bad = t['input_ids'].clone()
        bad[3] = ids
        shard_with(cut, 1, input_ids=bad)
        c = TeacherCache(cut)
        with pytest.raises(CacheError, match=f'shard-00001.safetensors: a token id {why}'): c[2]
    shard_with(cut, 1, input_ids=t['input_ids'], lens=t['lens']+1)
    with pytest.raises(CacheError, match='lengths do not add up'): TeacherCache(cut)[2]
    shard_with(cut, 1, lens=t['lens'], prompt_lens=t['lens'].clone())
    with pytest.raises(CacheError, match='lengths do not add up'): TeacherCache(cut)[2]
    for s in ('.safetensors', '.json'): shutil.copy(cut/f'shard-00000{s}', cut/f'shard-00001{s}')
    with pytest.raises(CacheError, match=r'shards \[1\] are missing'): TeacherCache(cut)
    with pytest.raises(CacheError, match="sidecar belongs to 'shard-00000.safetensors'"): dc.check_tensors(shard_path(cut, 1))

@pytest.mark.parametrize('vocab', [259, 70_000])
@pytest.mark.parametrize('codec', ['topk', 'sampled'])
def test_ids_of_a_sparse_store_lie_in_the_vocabulary(tmp_path, codec, vocab):
    rows,bits = [dict(r, response='and so on') for r in ROWS[:4]],high_bits(vocab)
    d = build_cache(tiny_teacher(tiny_model(vocab_size=vocab)), rows, tmp_path/'c', codec=codec, shard_size=2, progress=False).path
    was = load_file(shard_path(d, 1))
    ids = unpack_ids(was['ids'], was.get('high'), bits)
    assert TeacherCache(d).verify()==[] and 0<ids.max()<vocab
    ids.view(-1)[-1] = vocab
    shard_with(d, 1, **pack_ids(ids, bits))
    c = TeacherCache(d)
    assert c[1]['index']==1
    with pytest.raises(CacheError, match=f'shard-00001.safetensors: a token id lies outside the vocabulary of {vocab}'): c[2]

class Bomb:
    def __init__(self, marker): self.marker = marker

    def __reduce__(self): return os.mkdir, (str(self.marker),)

def test_pickle_never_runs(cut, tmp_path):
    bomb,marker = pickle.dumps(Bomb(tmp_path/'marker')),tmp_path/'marker'
    for p in (shard_path(cut, 1), cut/'codec.safetensors'):
        side = load_json(p.with_suffix('.json'))
        p.write_bytes(bomb)
        save_json({**side, 'bytes': len(bomb), 'data_sha256': sha256_file(p)}, p.with_suffix('.json'))
        with pytest.raises(CacheError, match=f'{p.name}: not a safetensors file'): TeacherCache(cut)[2]
    tiny_model().save_pretrained(tmp_path/'model')
    (tmp_path/'model/model.safetensors').unlink()
    (tmp_path/'model/pytorch_model.bin').write_bytes(bomb)
    with pytest.raises(OSError, match='model.safetensors'): TeacherSynthesizer(tmp_path/'model', tokenizer=tiny_tokenizer())
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()

@pytest.mark.parametrize('name', ['manifest.json', 'shard-00001.json', 'shard-00001.safetensors', 'codec.safetensors', 'tokenizer', 'tokenizer/tokenizer.json'])
def test_links_out_of_the_folder(teacher, whole, cut, tmp_path, name):
    away = tmp_path/'away'
    (cut/name).rename(away)
    (cut/name).symlink_to(away)
    with pytest.raises(CacheError): TeacherCache(cut)[2]
    try: said = TeacherCache(cut, partial=True).verify()
    except CacheError as e: said = [str(e)]
    assert any('a link that leads out of its folder' in o for o in said)

def stamps(p): return {o: o.stat().st_mtime_ns for o in (p, *p.rglob('*')) if o!=p or p.is_file()}

LINKED = ('shard-00001.json', 'shard-00001.safetensors', 'codec.safetensors', 'tokenizer', 'tokenizer/tokenizer.json', '.shard-00001.safetensors.tmp')

@pytest.mark.parametrize('name', LINKED)
def test_nothing_is_written_through_a_link(teacher, whole, cut, tmp_path, name):
    away = tmp_path/'away'
    (cut/name).rename(away) if (cut/name).exists() else away.write_text('mine')
    (cut/name).symlink_to(away)
    if name.endswith('.tmp'): shard_path(cut, 1).unlink()
    was = stamps(away)
    repair_cache(teacher, cut, ROWS)
    assert tree(cut)==tree(whole) and not [p for p in cut.rglob('*') if p.is_symlink()] and stamps(away)==was

@pytest.mark.parametrize('name', ['.lock', '.lock.1', '.manifest.json.tmp'])
def test_a_link_in_the_way_of_a_writer_is_refused(teacher, cut, tmp_path, name):
    (tmp_path/'away').write_text('mine')
    (cut/name).unlink(missing_ok=True)
    (cut/name).symlink_to(tmp_path/'away')
    with pytest.raises(CacheError, match='a link that leads out of its folder'): build_cache(teacher, [*ROWS, 'Say m.'], cut, **KW)
    assert (tmp_path/'away').read_text()=='mine'

def test_verify_says_all_that_is_wrong(cut, capsys):
    "Of a cache that cannot be opened, too"
    from distill_nb.plan import main
    for p in (cut/'codec.safetensors', shard_path(cut, 1)): flip(p, -1)
    with pytest.raises(CacheError, match='codec.safetensors'): TeacherCache(cut, partial=True)
    assert main(['verify', str(cut)])==1
    assert re.findall(r'(\S+) expected SHA', capsys.readouterr().out)==[f"{cut/'codec.safetensors'}:", f'{shard_path(cut, 1)}:']

EXTRAS = dict(layers=(1,), attention=(0,), relations=0)

@pytest.mark.parametrize('how', [dict(dtype='int8', **EXTRAS), dict(codec='transform'), dict(codec='topk', k=4), dict(codec='sampled'), dict(codec='full')])
def test_the_page_of_the_format_names_everything(tmp_path, how):
    nbs = [json.loads((Path(__file__).parents[1]/f'nbs/{n}.ipynb').read_text(encoding='utf-8')) for n in ('00b_sparse', '00e_cache')]
    page = [s for nb in nbs for c in nb['cells'] if (s := ''.join(c['source'])).startswith('## On disk, precisely')]
    m = build_cache(tiny_teacher(eager(tiny_model())), ROWS, tmp_path/'c', **how, **KW).manifest
    p = shard_path(tmp_path/'c', 0)
    names = {*m, *m['teacher'], *m['generation'], *m['shards'][0], *load_json(p.with_suffix('.json'))}
    names |= {re.sub(r'\.\d+$', '.K', k) for f in (p, tmp_path/'c/codec.safetensors') for k in load_file(f)}
    assert len(page)==2 and not [k for k in names if not re.search(rf'`{re.escape(k)}\b', ' '.join(page))]

def test_teacher_is_the_same_after_training(whole):
    from distill_nb.loss import DistillationLoss
    from distill_nb.trainer import train_distillation
    t,student = tiny_teacher(),tiny_model(5)
    before,was = weights_sha256(t.model),weights_sha256(student)
    c = t.cache = TeacherCache(whole)
    opt,batches = torch.optim.AdamW(student.parameters(), 1e-3),DataLoader(c, 4, collate_fn=c.collate)
    train_distillation(student, t, batches, opt, DistillationLoss(), 'cpu', accum_steps=1, max_steps=3)
    assert weights_sha256(student)!=was and weights_sha256(t.model)==before

def test_no_network(monkeypatch):
    def connect(*a): raise AssertionError('a connection was tried')
    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='use embedded_teacher') as e: TeacherSynthesizer('nobody/nothing')
    assert '\n' not in str(e.value)

def test_code_in_a_cache_never_runs(cut, tmp_path):
    p = cut/'tokenizer/tokenizer_config.json'
    p.write_text(p.read_text().replace('{', '{"auto_map": {"AutoTokenizer": ["own.T", "own.T"]}, ', 1))
    (cut/'tokenizer/own.py').write_text(f'import os; os.mkdir({str(tmp_path/"marker")!r})\nclass T: pass')
    try: TeacherCache(cut)
    except CacheError: pass
    assert not (tmp_path/'marker').exists()

def test_what_a_loader_is_told_reaches_processor_and_model(monkeypatch):
    def told(*a, **kw):
        asked.append(kw)
        return SimpleNamespace(tokenizer=tiny_tokenizer()) if len(asked)==1 else tiny_model()
    asked = []
    for o in (AutoProcessor, AutoModelForImageTextToText): monkeypatch.setattr(o, 'from_pretrained', told)
    ImageTeacher('a/b', device='cpu', revision='r', trust_remote_code=True, quantization_config='q')
    both = dict(revision='r', trust_remote_code=True)
    assert asked[0]==both and asked[1]==both|dict(dtype='auto', use_safetensors=True, quantization_config='q')

def test_code_of_a_model_never_runs(cut, tmp_path, monkeypatch):
    "Nobody is asked on the terminal either, where a yes would run it"
    monkeypatch.setattr('builtins.input', lambda *a: 'y')
    names = ('AutoConfig', 'AutoModelForCausalLM', 'AutoModelForImageTextToText', 'AutoProcessor')
    d,own,asked = tmp_path/'m',dict(model_type='own', auto_map={o: 'own.C' for o in names}),[]
    d.mkdir()
    for o in ('config.json', 'processor_config.json'): (d/o).write_text(json.dumps(own))
    (d/'own.py').write_text(f'import os; os.mkdir({str(tmp_path/"marker")!r})')
    sees = SimpleNamespace(tokenizer=tiny_tokenizer())
    for load in (partial(TeacherSynthesizer, tokenizer=tiny_tokenizer()), auto_class, ImageTeacher, partial(ImageTeacher, processor=sees)):
        with pytest.raises(ValueError, match='trust_remote_code=True'): load(d)
    assert not (tmp_path/'marker').exists()
    for o in (AutoTokenizer, AutoModelForCausalLM):
        def said(*a, load=o.from_pretrained, **kw):
            asked.append(kw.get('trust_remote_code'))
            return load(*a, **kw)
        monkeypatch.setattr(o, 'from_pretrained', said)
    for o in (tiny_model(), tiny_tokenizer()): o.save_pretrained(tmp_path/'plain')
    TeacherSynthesizer(tmp_path/'plain', device='cpu')
    TeacherCache(cut)
    assert asked==[False]*3

if __name__=='__main__': two(Path(sys.argv[1]))
