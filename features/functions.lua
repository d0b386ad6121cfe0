#!lua name=churnstream_@VERSION@

-- State of a partition, written all or nothing under the nonce of its owner. docs/state.md describes the keys.
-- Results: 1 done, 0 this very batch is in already, {-1} fenced, {-2, stored offsets ...} chain broken, {-3, format} unknown format,
-- {-4} a rebuild is under way, or is not, {-5} the list of customers is not whole, {-6, format} to be migrated,
-- {-7} a rebuild went back.
-- A function that fails half way would leave half a batch: everything that can be refused is refused before the first write.
-- Library and functions carry a digest of this text in their names, so workers of two versions never call each other's.

local FENCED, BROKEN, UNKNOWN_FORMAT, REBUILDING, LIST_DAMAGED, TO_MIGRATE, WENT_BACK = -1, -2, -3, -4, -5, -6, -7
local DIGEST = 8 -- bytes of a customer in the list
local SLICE = 1000 -- arguments unpacked onto the Lua stack at once, which holds about 8000

local function slices(count, each)
  for first = 1, count, SLICE do
    each(first, math.min(first + SLICE - 1, count))
  end
end

-- nil when the nonce owns the partition and a rebuild is under way as it should be, else the refusal.
local function refused(meta, nonce, rebuilding, topics)
  local owner = redis.call('HMGET', meta, 'owner', 'format', 'rebuilding')
  if not owner[2] then
    local nothing = {BROKEN}
    for i = 1, topics do nothing[i + 1] = '-1' end
    return nothing
  end
  if owner[1] ~= nonce then return {FENCED} end
  if rebuilding ~= nil and (owner[3] ~= false) ~= rebuilding then return {REBUILDING} end
end

local function list_damaged(meta, who)
  local counted = tonumber(redis.call('HGET', meta, 'customers') or '0')
  if redis.call('STRLEN', who) ~= DIGEST * counted then return {LIST_DAMAGED} end
end

local function append(meta, who, digests)
  if #digests == 0 then return end
  redis.call('APPEND', who, digests)
  redis.call('HINCRBY', meta, 'customers', #digests / DIGEST)
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

-- keys[1 + first] ... get args[value_at + first] ...
local function set(keys, key_at, args, value_at, count)
  slices(count, function(first, last)
    local both = {}
    for i = first, last do
      both[2 * (i - first) + 1] = keys[key_at + i]
      both[2 * (i - first) + 2] = args[value_at + i]
    end
    redis.call('MSET', unpack(both))
  end)
end

local function unlink(keys, key_at)
  slices(#keys - key_at, function(first, last)
    redis.call('UNLINK', unpack(keys, key_at + first, key_at + last))
  end)
end

-- keys: meta, list of customers, outbox. All three values.
local function look(keys, args)
  return {redis.call('HGETALL', keys[1]), redis.call('GET', keys[2]) or '', redis.call('GET', keys[3]) or ''}
end

-- keys: as look. args: nonce, format, formats that can be migrated. Returns what look does.
local function claim(keys, args)
  local meta = keys[1]
  local found = redis.call('HMGET', meta, 'owner', 'format')
  local known = not found[2] or found[2] == args[2]
  local migrated = false
  for i = 3, #args do migrated = migrated or found[2] == args[i] end
  if not known and not migrated then return {UNKNOWN_FORMAT, found[2]} end
  if found[1] ~= args[1] then
    redis.call('HSET', meta, 'owner', args[1])
    redis.call('HINCRBY', meta, 'epoch', 1)
  end
  if migrated then return {TO_MIGRATE, found[2]} end
  if not found[2] then redis.call('HSET', meta, 'format', args[2]) end
  return look(keys, args)
end

-- keys: meta, list of customers. args: nonce, format before, format after, digests of all customers.
-- Format 1 -> 2: a list of customers.
local function migrate(keys, args)
  local refusal = refused(keys[1], args[1], nil, 0)
  if refusal then return refusal end
  local found = redis.call('HGET', keys[1], 'format')
  if found == args[3] then return 0 end
  if found ~= args[2] then return {UNKNOWN_FORMAT, found} end
  redis.call('UNLINK', keys[2])
  append(keys[1], keys[2], args[4])
  redis.call('HSET', keys[1], 'format', args[3])
  return 1
end

-- keys: meta, list of customers. args: nonce, intent, then topic and former offset of each topic.
local function intend(keys, args)
  local meta, topics = keys[1], (#args - 2) / 2
  local refusal = refused(meta, args[1], false, topics) or list_damaged(meta, keys[2])
  if refusal then return refusal end
  local offsets = stored(meta, args, 3, 2, topics)
  if not equal(offsets, args, 4, 2) then return {BROKEN, unpack(offsets)} end
  redis.call('HSET', meta, 'intent', args[2])
  return 1
end

-- keys: meta, list of customers, outbox, keys to set, keys to delete.
-- args: nonce, model, watermark, digests of new customers, outbox, number of topics, of counters, of keys to set;
--       then topic, former, to of each topic; name and increment of each counter; the values to set.
local function apply(keys, args)
  local meta, nonce, model, watermark, digests, outbox = keys[1], args[1], args[2], tonumber(args[3]), args[4], args[5]
  local topics, counters, sets = tonumber(args[6]), tonumber(args[7]), tonumber(args[8])
  local counter_at = 8 + 3 * topics
  local value_at = counter_at + 2 * counters
  if #args ~= value_at + sets or #keys < 3 + sets then return redis.error_reply('ERR churn_apply: wrong number of arguments') end
  local refusal = refused(meta, nonce, false, topics) or list_damaged(meta, keys[2])
  if refusal then return refusal end
  local offsets, fields = stored(meta, args, 9, 3, topics)
  if equal(offsets, args, 11, 3) then return 0 end
  if not equal(offsets, args, 10, 3) then return {BROKEN, unpack(offsets)} end
  for i = 1, counters do
    redis.call('HINCRBY', meta, args[counter_at + 2 * i - 1], args[counter_at + 2 * i])
  end
  set(keys, 3, args, value_at, sets)
  unlink(keys, 3 + sets)
  append(meta, keys[2], digests)
  if #outbox > 0 then redis.call('SET', keys[3], outbox) else redis.call('UNLINK', keys[3]) end
  local known = tonumber(redis.call('HGET', meta, 'watermark') or '-1')
  local update = {'outbox', #outbox, 'model', model}
  if watermark >= known then
    update[#update + 1] = 'watermark'
    update[#update + 1] = args[3]
  end
  for i = 1, topics do
    update[#update + 1] = fields[i]
    update[#update + 1] = args[8 + 3 * i]
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

-- keys: meta, list of customers, outbox. args: nonce. From here on `clear` may remove, and no batch is taken.
local function begin_rebuild(keys, args)
  local refusal = refused(keys[1], args[1], nil, 0)
  if refusal then return refusal end
  redis.call('HSET', keys[1], 'rebuilding', '1', 'customers', '0', 'outbox', '0')
  redis.call('UNLINK', keys[2], keys[3])
  return 1
end

-- keys: meta, keys to delete. args: nonce.
local function clear(keys, args)
  local refusal = refused(keys[1], args[1], true, 0)
  if refusal then return refusal end
  unlink(keys, 1)
  return 1
end

-- keys: meta, list of customers, main keys, chunk keys to set, keys to delete.
-- args: nonce, number of customers, of chunks to set, digests of all customers, how many parts came before; then the values to set.
local function restore(keys, args)
  local meta, customers, chunks, digests, before = keys[1], tonumber(args[2]), tonumber(args[3]), args[4], tonumber(args[5])
  if #args ~= 5 + customers + chunks or #keys < 2 + customers + chunks or #digests ~= DIGEST * customers then
    return redis.error_reply('ERR churn_restore: wrong number of arguments')
  end
  local refusal = refused(meta, args[1], true, 0) or list_damaged(meta, keys[2])
  if refusal then return refusal end
  -- 1 and the parts so far. One more than was said: this very part is in, and its answer was lost.
  local parts = tonumber(redis.call('HGET', meta, 'rebuilding')) - 1
  if parts ~= before and parts ~= before + 1 then return {WENT_BACK} end
  local new = {}
  for i = 1, customers do
    -- Whoever has state is in the list: so a repeated call adds nobody twice.
    if redis.call('EXISTS', keys[2 + i]) == 0 then new[#new + 1] = string.sub(digests, DIGEST * (i - 1) + 1, DIGEST * i) end
    redis.call('SET', keys[2 + i], args[5 + i])
  end
  set(keys, 2 + customers, args, 5 + customers, chunks)
  unlink(keys, 2 + customers + chunks)
  append(meta, keys[2], table.concat(new))
  redis.call('HSET', meta, 'rebuilding', string.format('%.0f', before + 2))
  return 1
end

-- keys: meta, list of customers. args: nonce, intent or '', model, watermark, number of topics, of counters, parts restored;
--       then topic and offset of each topic; name and value of each counter.
local function finish_rebuild(keys, args)
  local meta, topics = keys[1], tonumber(args[5])
  local refusal = refused(meta, args[1], nil, 0)
  if refusal then return refusal end
  local parts = redis.call('HGET', meta, 'rebuilding')
  if not parts then
    if equal(stored(meta, args, 8, 2, topics), args, 9, 2) then return 0 end
    return {REBUILDING}
  end
  if tonumber(parts) - 1 ~= tonumber(args[7]) then return {WENT_BACK} end
  refusal = list_damaged(meta, keys[2])
  if refusal then return refusal end
  local kept = redis.call('HMGET', meta, 'owner', 'format', 'epoch', 'customers')
  local update = {'owner', kept[1], 'format', kept[2], 'epoch', kept[3], 'customers', kept[4], 'outbox', '0', 'model', args[3], 'watermark', args[4]}
  if args[2] ~= '' then
    update[#update + 1] = 'intent'
    update[#update + 1] = args[2]
  end
  for i = 8, #args, 2 do
    update[#update + 1] = (i < 8 + 2 * topics and 'applied:' or '') .. args[i]
    update[#update + 1] = args[i + 1]
  end
  redis.call('DEL', meta)
  redis.call('HSET', meta, unpack(update))
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

-- keys and args: as load. All of meta, and what load gives: of one moment, so that a state is never told with another batch's offsets.
local function lookup(keys, args)
  return {redis.call('HGETALL', keys[1]), load(keys, args)}
end

-- allow-oom: what a full server needs in order to become less full, and what writes a few bytes at most.
redis.register_function{function_name = 'churn_claim_@VERSION@', callback = claim, flags = {'allow-oom'}}
redis.register_function('churn_migrate_@VERSION@', migrate)
redis.register_function('churn_intend_@VERSION@', intend)
redis.register_function('churn_apply_@VERSION@', apply)
redis.register_function{function_name = 'churn_release_@VERSION@', callback = release, flags = {'allow-oom'}}
redis.register_function{function_name = 'churn_begin_rebuild_@VERSION@', callback = begin_rebuild, flags = {'allow-oom'}}
redis.register_function{function_name = 'churn_clear_@VERSION@', callback = clear, flags = {'allow-oom'}}
redis.register_function('churn_restore_@VERSION@', restore)
redis.register_function('churn_finish_rebuild_@VERSION@', finish_rebuild)
redis.register_function{function_name = 'churn_look_@VERSION@', callback = look, flags = {'no-writes'}}
redis.register_function{function_name = 'churn_load_@VERSION@', callback = load, flags = {'no-writes'}}
redis.register_function{function_name = 'churn_lookup_@VERSION@', callback = lookup, flags = {'no-writes'}}
