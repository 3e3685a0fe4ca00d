"""A server with OpenAI's API, for one model, several, or adapters of one.

errors       errors in OpenAI's shape
protocol     requests, checked
router       names of models, and splits by weight
variants     models read from folders, with their engines
worker       the thread that owns the engines
generation   requests of the engine, and its tokens as text
completions  /v1/completions
tools        calls of tools in a text
chat         /v1/chat/completions
metrics      Prometheus
http         bodies, streams, clients that leave
app          paths and limits
server       socket, signals, shutdown

Its modules need the extra `serve` (FastAPI, uvicorn, prometheus-client).
"""
