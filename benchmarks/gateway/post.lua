-- wrk script: POST a chat body of about 600 bytes; STREAM=1 asks for a stream.
local stream = os.getenv("STREAM") == "1" and "true" or "false"
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.headers["x-api-key"] = os.getenv("KEY")
wrk.body = '{"model":"qwen2.5-7b-instruct","stream":' .. stream ..
  ',"max_tokens":64,"messages":[{"role":"user","content":"' .. string.rep("hello agent ", 42) .. '"}]}'
