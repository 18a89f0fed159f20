"""The sections that every config starts from.

Each option is listed, so that a flag can set it; None means the constructor's own default.
"""

from ml_collections import config_dict


def unset(kind: type) -> config_dict.FieldReference:
  """An option of the given type that keeps its constructor's default until a flag sets it."""
  return config_dict.placeholder(kind)


def documents() -> dict:
  """The section of a source whose documents are given beside those of `data`."""
  names = ('source', 'path', 'name', 'split', 'text', 'pair', 'label', 'target', 'unit')
  return {name: unset(str) for name in (*names, 'delimiter', 'data_dir')} | dict(
    fields=unset(tuple)
  )


def model(name: str, variant: str) -> dict:
  """The section of a model; an option that is None is what the variant has.

  The modules in `llm_jax/models` document these options and the rarer ones.
  """
  return dict(
    name=name,
    variant=variant,
    dtype='auto',  # bfloat16 on TPUs and GPUs, float32 on CPUs
    param_dtype=unset(str),  # float32; bfloat16 for a base that is frozen
    remat='auto',  # the least recomputation with which a step fits the device
    unroll=unset(int),
    attention=unset(str),
    cache_dtype=unset(str),  # int8: what generation keeps of tokens, in 8 bits
    dim=unset(int),
    layers=unset(int),
    heads=unset(int),
    kv_heads=unset(int),
    mlp_dim=unset(int),
    max_len=unset(int),
    vocab_size=unset(int),
    dropout=unset(float),
    attention_dropout=unset(float),
  )


def mlm() -> dict:
  """Masked LM as in BERT, on packed documents."""
  return dict(
    name='mlm',
    mask_rate=0.15,
    masking='token',
    mask_token_rate=0.8,
    random_token_rate=0.1,
    packing='best_fit',
    words=unset(str),
    label_smoothing=0.0,
    z_loss=0.0,
  )


def clm() -> dict:
  """Causal LM as in GPT-2: one stream of documents, cut into rows."""
  return dict(
    name='clm',
    packing='windows',
    fim_rate=unset(float),  # fill in the middle
    fim_spm=unset(float),
    label_smoothing=0.0,
    z_loss=0.0,
  )


def seq2seq() -> dict:
  """From text to text, several pairs in a row."""
  return dict(
    name='seq2seq',
    source_len=256,
    start=unset(int),  # ids: what the folder or the tokenizer says
    forced_bos=unset(int),
    forced_eos=unset(int),
    packing='best_fit',
    long='cut',
    label_smoothing=0.1,
    z_loss=0.0,
  )


def writing(max_new_tokens: int) -> dict:
  """How evaluators have new text written."""
  return dict(
    max_new_tokens=max_new_tokens,
    min_new_tokens=unset(int),
    no_repeat_ngram_size=unset(int),
    repetition_penalty=unset(float),
    beams=1,
    length_penalty=unset(float),
  )


def bert() -> dict:
  """The loss of BERT: masked LM plus next-sentence prediction."""
  masking = {key: value for key, value in mlm().items() if key not in ('name', 'packing')}
  return dict(
    name='mix',
    rows='nsp',
    weights=dict(mlm=1.0, nsp=1.0),
    parts=dict(mlm=masking, nsp=dict(short_seq_rate=0.1)),
  )


def fine_tuning() -> dict:
  """The recipe of BERT for pretrained weights (arXiv:1810.04805, appendix A.3), in a section
  `pretrained`: it is laid over the others where `init_from` is given.
  """
  return dict(
    optimizer=dict(
      name='adamw', learning_rate='auto', weight_decay=0.01, warmup_fraction=0.1, schedule='linear'
    )
  )


def get_config() -> config_dict.ConfigDict:
  """The sections that all configs share, with the standard library of Python as the corpus.

  A config adds steps, sizes, model and objective.
  """
  return config_dict.ConfigDict(
    dict(
      epochs=unset(float),  # passes over the training rows, in place of steps
      seed=0,
      folds=unset(int),  # of a cross-validation
      fold=unset(int),  # the one that this run holds out; None: all, one after the other
      fold_groups=unset(str),  # a field of the records whose values are never cut apart
      micro_batches=unset(int),  # None: the fewest with a moderate number of tokens per device
      log_every=10,
      eval_every=500,  # 0: an epoch
      init_from=unset(str),
      reinit_layers=0,  # layers from the top that start anew, whatever init_from has
      data=dict(
        # stdlib | docstrings | text | jsonl | csv | parquet | tfds | conll | conllu | word_tag |
        # squad, or 'mixture' with a section for each of its sources in `parts`
        source='stdlib',
        path=unset(str),
        name=unset(str),
        split=unset(str),
        text=unset(str),
        pair=unset(str),
        label=unset(str),
        target=unset(str),
        fields=unset(tuple),  # further fields that the objective reads
        unit=unset(str),
        delimiter=unset(str),
        data_dir=unset(str),
        column=unset(str),  # of tags in CoNLL-U
        word_column=unset(int),  # of CoNLL's columns
        tag_column=unset(int),
        separator=unset(str),  # between word and tag
        candidates=unset(int),  # of the source `summaries`
        max_document_bytes=unset(int),
        validation=0.02,  # share of the documents, chosen by their hash
        cache=unset(str),  # None: ~/.cache/llm_jax
        workers=0,  # processes that tokenize; 0: one per core
        # Copies of the training documents in other words
        augment=dict(
          synonyms=unset(str),
          rate=unset(float),
          copies=unset(int),
          operations=unset(tuple),
          seed=unset(int),
        ),
      ),
      validation=documents(),  # in place of a share of the data
      test=documents(),  # scored once, by the best checkpoint
      tokenizer=dict(
        name='sentencepiece',
        vocab_size=8192,
        path=unset(str),
        kind=unset(str),
        normalization=unset(str),
        sample_bytes=unset(int),
        character_coverage=unset(float),
        added=unset(tuple),  # texts of further special tokens
        sentinels=unset(int),  # <extra_id_0> and so on
      ),
      optimizer=dict(
        name='adamw',
        learning_rate=1e-3,
        schedule='linear',
        warmup_steps=unset(int),
        warmup_fraction=0.05,
        decay_fraction=unset(float),
        final_fraction=unset(float),
        weight_decay=0.01,
        clip_norm=1.0,
        layer_decay=1.0,
        ema_decay=0.0,
        b1=unset(float),
        b2=unset(float),
        eps=unset(float),
        momentum=unset(float),
      ),
      # What is trained beside a frozen base: lora | adalora | ia3 | bitfit | bottleneck | prefix |
      # prompt | p_tuning | freeze, each with options of its own among these
      adapter=dict(
        name=unset(str),
        rank=unset(int),
        alpha=unset(float),
        dropout=unset(float),
        targets=unset(str),
        rslora=unset(bool),
        dora=unset(bool),
        loraplus_lr_ratio=unset(float),
        embeddings=unset(bool),
        target_rank=unset(int),
        warmup_steps=unset(int),
        final_steps=unset(int),
        every=unset(int),
        orthogonality=unset(float),
        inputs=unset(str),
        outputs=unset(str),
        size=unset(int),
        placement=unset(str),
        activation=unset(str),
        scale=unset(float),
        length=unset(int),
        hidden=unset(int),
        layers=unset(int),
        heads=unset(str),
      ),
      base_weights='',  # int8: the kernels of the frozen base in a quarter of the memory
      # What makes a model smaller, in --mode=compress: int8 | int4 | svd | structured | vocabulary
      # | magnitude | movement, each with some of these
      compress=dict(
        name=unset(str),
        rows=unset(int),
        tolerance=unset(float),
        group=unset(int),
        activations=unset(str),
        sensitive=unset(float),
        vocabulary=unset(bool),
        share=unset(float),
        rank=unset(int),
        weighted=unset(bool),
        least=unset(int),
        pattern=unset(str),
        begin=unset(float),
        end=unset(float),
        every=unset(int),
        heads=unset(float),
        mlp=unset(float),
        layers=unset(int),
        keep=unset(tuple),
      ),
      # A folder whose model is learned from too; what of it, in which proportion
      teacher=unset(str),
      distill=dict(
        temperature=unset(float),
        soft=unset(float),
        hard=unset(float),
        hidden=unset(float),
        hidden_loss=unset(str),
        relations=unset(float),
        relation_heads=unset(int),
        relation_layer=unset(int),
        weights=unset(str),
        param_dtype=unset(str),
        cached=unset(bool),
      ),
      # Texts are moved to learn from them: fgm | pgd | freelb | smart, each with some of these
      adversarial=dict(
        name=unset(str),
        epsilon=unset(float),
        norm=unset(str),
        share=unset(float),
        steps=unset(int),
        step_size=unset(float),
        start=unset(float),
        weight=unset(float),
      ),
      # `llm_jax/parallel/sharding.py` says what each axis cuts
      mesh=dict(data=-1, fsdp=1, sequence=1, tensor=1, dcn_data=1, dcn_fsdp=1, rules='fsdp'),
      checkpoint=dict(every=1000, keep=2),
      evaluation=dict(rows=512, patience=0, samples=2, slices=unset(tuple)),
      logging=dict(tensorboard=True, wandb=unset(str)),
      # Traces `steps` steps after the first `start`, into WORKDIR/profile
      profile=dict(start=0, steps=0),
    )
  )
