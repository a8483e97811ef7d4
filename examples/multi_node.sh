#!/usr/bin/env bash
# vLLM on several nodes, by its own launcher: tensor parallel inside a node, pipeline stages between nodes. The slow
# network then carries activations from stage to stage, and no all_reduce. Run it on every node, with ep2tp installed:
#
#     NODES=2 GPUS=8 examples/multi_node.sh 0 10.0.0.1 MODEL      on the first node, which answers on port 8000
#     NODES=2 GPUS=8 examples/multi_node.sh 1 10.0.0.1 MODEL      on the second
#
# Further arguments are vLLM's, and win over those here. Set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where nodes have
# several networks.
set -euo pipefail
export EP2TP=${EP2TP:-on}

rank=${1:?number of this node, from 0}
first=${2:?address of node 0}
model=${3:?model}
shift 3

launch=(vllm serve "$model"
    --nnodes "${NODES:?number of nodes}" --node-rank "$rank" --master-addr "$first"
    --tensor-parallel-size "${GPUS:?GPUs of a node}" --pipeline-parallel-size "$NODES")
if [ "$rank" != 0 ]; then
    launch+=(--headless)
fi
exec "${launch[@]}" "$@"
