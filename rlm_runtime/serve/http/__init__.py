"""What both servers share: HTTP without a word about models.

| file | |
|---|---|
| `settings` | limits that a client can meet; API keys, host names |
| `schemas` | request and response objects of OpenAI's API that both servers use |
| `app` | the ASGI application around a server's own routes: probes, /metrics, /openapi.json |
| `middleware` | request ids, checks of host, origin, key and body, the log |
| `admission` | how many requests run and wait; draining |
| `endpoint` | one JSON request: read, run, answered whole or as server-sent events; disconnects |
| `files` | uploads and their routes |
| `errors`, `metrics`, `openapi` | errors in one format; Prometheus metrics; the parts of an OpenAPI
document |
| `server` | uvicorn with a time limit for heads, and draining at SIGTERM |

It stands in `rlm_runtime`, which needs no JAX, so that both servers and their clients run where no
JAX is.
"""
