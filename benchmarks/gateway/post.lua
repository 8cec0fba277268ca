-- wrk script: POST a chat body of about 600 bytes; STREAM=1 asks for a stream.
-- With SEED every prompt is new: words drawn at random, alike for the same seed.
local stream = os.getenv("STREAM") == "1" and "true" or "false"
local seed = tonumber(os.getenv("SEED"))
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.headers["x-api-key"] = os.getenv("KEY")

local function body(text)
  return '{"model":"qwen2.5-7b-instruct","stream":' .. stream ..
    ',"max_tokens":64,"messages":[{"role":"user","content":"' .. text .. '"}]}'
end

wrk.body = body(string.rep("hello agent ", 42))

if seed then
  local words = {}
  for word in ("sort the list of numbers and return its median because every query must join orders " ..
    "with customers where price exceeds average while proving that integers divide error table not " ..
    "found try again search page click result write tests plan next step"):gmatch("%S+") do
    words[#words + 1] = word
  end
  math.randomseed(seed)
  request = function()
    local text = {}
    for i = 1, 84 do text[i] = words[math.random(#words)] end
    return wrk.format(nil, nil, nil, body(table.concat(text, " ")))
  end
end
