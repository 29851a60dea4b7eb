"""Hybrid decoding inside vLLM, as an out-of-tree plugin: thinking states in an unmodified engine (docs/vllm.md).

| module      | holds                                                                                             |
|-------------|---------------------------------------------------------------------------------------------------|
| `plugin`    | what vLLM calls when it starts: it registers the classes below and checks the engine's settings   |
| `models`    | vLLM's own class of a causal LM, with thinking modules as weights of the model                    |
| `slots`     | the thinking state of each running request: tensors with one row a request, no loop over requests |
| `runner_v2` | the link to vLLM's model runner V2 (GPUs)                                                         |
| `runner_v1` | the link to vLLM's model runner V1 (CPUs)                                                         |
| `workers`   | vLLM's workers, which also return the traces of finished requests                                 |
| `traces`    | their order, and their form as text for another process                                           |
| `engine`    | the door for users: `thinking_llm`                                                                |

vLLM is imported by these modules only, and only when it is used.
"""
