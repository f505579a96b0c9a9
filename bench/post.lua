-- wrk's script: posts one fixed body, and prints what came of it as a line of JSON.
--
--     wrk ... --script post.lua URL -- BODY_FILE CONTENT_TYPE

function init(args)
   local file = assert(io.open(args[1], "rb"))
   wrk.method = "POST"
   wrk.body = file:read("*a")
   wrk.headers["Content-Type"] = args[2]
   file:close()
   request_bytes = wrk.format()
end

function request()
   return request_bytes
end

function done(summary, latency, requests)
   local errors = summary.errors
   -- wrk counts durations and latencies in microseconds
   io.write(string.format('{"signed": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d}\n',
      summary.requests - errors.status, summary.duration / 1e6,
      latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
