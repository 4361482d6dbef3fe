#!/bin/sh
# A sweep over the number of mini-sequences M and the precision, gathered into one table and one picture.
#
# As it stands it trains a small model. On a CPU the bytes of tensors are counted, which makes the steps slower. The real
# size, on a GPU (a run that does not fit its memory leaves that as its result):
#   sh sweep.sh model=llama3_8b optimizer=adamw_in_backward trainer=gpu trainer.max_steps=4 data.sequence_length=65536 \
#     mst.mlp_chunks=1,4,16 precision=bf16-true,nf4-lora
#
# Needs: pip install 'lightning-mst[plots]' (and [quantized] for nf4-lora)

runs=${*:-"
  data.max_documents=40 data.validation_fraction=0.2 data.vocab_size=512 data.sequence_length=2048
  model.config.hidden_size=64 model.config.intermediate_size=256 model.config.num_hidden_layers=2
  trainer.max_steps=2 trainer.limit_val_batches=1 callbacks.mst.log_memory=tensors
  mst.mlp_chunks=1,4 precision=32-true,bf16-true"}

# The LM head takes the M of the MLPs. Any other setting can be swept in the same way.
lightning-mst train --multirun hydra.sweep.dir=sweep 'mst.lm_head_chunks=${mst.mlp_chunks}' $runs
status=$?
lightning-mst report sweep || status=$?
exit $status
