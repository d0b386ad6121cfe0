#!lua name=churnstream

-- State of a partition, written all or nothing under the nonce of its owner. docs/state.md describes the keys.
-- Results: 1 done, 0 this very batch is in already, {-1} fenced, {-2, stored offsets ...} chain broken, {-3, format} unknown format.
-- A function that fails half way would leave half a batch: everything that can be refused is refused before the first write.

local VERSION = '@VERSION@'
local FENCED, BROKEN, UNKNOWN_FORMAT = -1, -2, -3
local SLICE = 1000 -- arguments unpacked onto the Lua stack at once, which holds about 8000

local function slices(count, each)
  for first = 1, count, SLICE do
    each(first, math.min(first + SLICE - 1, count))
  end
end

-- nil when the nonce owns the partition, else the refusal.
local function refused(meta, nonce, topics)
  local owner = redis.call('HMGET', meta, 'owner', 'format')
  if not owner[2] then
    local nothing = {BROKEN}
    for i = 1, topics do nothing[i + 1] = '-1' end
    return nothing
  end
  if owner[1] ~= nonce then return {FENCED} end
end

-- The stored offset of each topic, as text; args[first], args[first + step], ... are the topics.
local function stored(meta, args, first, step, topics)
  local fields = {}
  for i = 1, topics do fields[i] = 'applied:' .. args[first + (i - 1) * step] end
  local offsets = redis.call('HMGET', meta, unpack(fields))
  for i = 1, topics do offsets[i] = offsets[i] or '-1' end
  return offsets, fields
end

local function equal(offsets, args, first, step)
  for i = 1, #offsets do
    if offsets[i] ~= args[first + (i - 1) * step] then return false end
  end
  return true
end

local function version(keys, args)
  return VERSION
end

-- keys: meta. args: nonce, format. Returns the whole meta hash.
local function claim(keys, args)
  local meta = keys[1]
  local found = redis.call('HMGET', meta, 'owner', 'format')
  if found[2] and found[2] ~= args[2] then return {UNKNOWN_FORMAT, found[2]} end
  if found[1] ~= args[1] then
    redis.call('HSET', meta, 'owner', args[1], 'format', args[2])
    redis.call('HINCRBY', meta, 'epoch', 1)
  end
  return redis.call('HGETALL', meta)
end

-- keys: meta. args: nonce, intent, then topic and former offset of each topic.
local function intend(keys, args)
  local meta, topics = keys[1], (#args - 2) / 2
  local refusal = refused(meta, args[1], topics)
  if refusal then return refusal end
  local offsets = stored(meta, args, 3, 2, topics)
  if not equal(offsets, args, 4, 2) then return {BROKEN, unpack(offsets)} end
  redis.call('HSET', meta, 'intent', args[2])
  return 1
end

-- keys: meta, keys to set, keys to delete.
-- args: nonce, model, watermark, number of topics, of counters, of keys to set;
--       then topic, former, to of each topic; name and increment of each counter; the values to set.
local function apply(keys, args)
  local meta, nonce, model, watermark = keys[1], args[1], args[2], tonumber(args[3])
  local topics, counters, sets = tonumber(args[4]), tonumber(args[5]), tonumber(args[6])
  local counter_at = 6 + 3 * topics
  local value_at = counter_at + 2 * counters
  if #args ~= value_at + sets or #keys < 1 + sets then return redis.error_reply('ERR churn_apply: wrong number of arguments') end
  local refusal = refused(meta, nonce, topics)
  if refusal then return refusal end
  local offsets, fields = stored(meta, args, 7, 3, topics)
  if equal(offsets, args, 9, 3) then return 0 end
  if not equal(offsets, args, 8, 3) then return {BROKEN, unpack(offsets)} end
  for i = 1, counters do
    redis.call('HINCRBY', meta, args[counter_at + 2 * i - 1], args[counter_at + 2 * i])
  end
  slices(sets, function(first, last)
    local both = {}
    for i = first, last do
      both[2 * (i - first) + 1] = keys[1 + i]
      both[2 * (i - first) + 2] = args[value_at + i]
    end
    redis.call('MSET', unpack(both))
  end)
  slices(#keys - 1 - sets, function(first, last)
    redis.call('UNLINK', unpack(keys, 1 + sets + first, 1 + sets + last))
  end)
  local known = tonumber(redis.call('HGET', meta, 'watermark') or '-1')
  local update = {'model', model, 'watermark', args[3]}
  if known > watermark then update = {'model', model} end
  for i = 1, topics do
    update[#update + 1] = fields[i]
    update[#update + 1] = args[6 + 3 * i]
  end
  redis.call('HSET', meta, unpack(update))
  redis.call('HDEL', meta, 'intent')
  return 1
end

-- keys: meta. args: nonce.
local function release(keys, args)
  if redis.call('HGET', keys[1], 'owner') == args[1] then redis.call('HDEL', keys[1], 'owner') end
  return 1
end

-- keys: meta. args: prefix of the main keys, prefix of the chunk keys, customers.
-- Per customer nil, or its main, or {main, closed chunk, ...} with nil for a chunk that is missing.
local function load(keys, args)
  local states, count = {}, #args - 2
  slices(count, function(first, last)
    local mains = {}
    for i = first, last do mains[i - first + 1] = args[1] .. args[2 + i] end
    mains = redis.call('MGET', unpack(mains))
    for i = first, last do
      local main = mains[i - first + 1]
      states[i] = main
      if main and #main >= 8 then
        local _, _, low, high, a, b, c, d = string.byte(main, 1, 8)
        local closed, number = low + 256 * high, a + 256 * (b + 256 * (c + 256 * d))
        if closed > 0 then
          local state = {main}
          local prefix = args[2] .. args[2 + i] .. ':'
          slices(closed, function(from, to)
            local names = {}
            for k = from, to do names[k - from + 1] = prefix .. string.format('%.0f', number + k - 1) end
            for k, chunk in ipairs(redis.call('MGET', unpack(names))) do state[from + k] = chunk end
          end)
          states[i] = state
        end
      end
    end
  end)
  return states
end

redis.register_function{function_name = 'churn_version', callback = version, flags = {'no-writes'}}
redis.register_function('churn_claim', claim)
redis.register_function('churn_intend', intend)
redis.register_function('churn_apply', apply)
redis.register_function('churn_release', release)
redis.register_function{function_name = 'churn_load', callback = load, flags = {'no-writes'}}
