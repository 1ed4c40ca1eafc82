// Sequences of heads with a state of keys times values: where their tokens lie, and how heads are shared out to tasks.
#pragma once
#include "tile.h"

namespace ev {

// q [B T G K] and what is like it, v [B T H V] and what is like it; groups of heads may share q and k.
struct Heads {
  int64_t batch, time, groups, heads, keys, values;
  int64_t span;  // tokens that one head does in a row
  bool back;     // in time
  const uint8_t *starts;

  static constexpr int64_t lanes = 64;  // values of a block: a pair of a head and a block needs no other
  int64_t width() const { return padded(keys); }
  int64_t value_blocks() const { return blocks(values, lanes); }
  int64_t columns(int64_t lane) const { return padded(std::min(lanes, values - lane)); }
  int64_t group_of(int64_t h) const { return h / (heads / groups); }
  int64_t end(int64_t begin) const { return std::min(begin + span, time); }
  int64_t ahead() const { return back ? -span : span; }  // where the pass goes next, in tokens
  bool start(int64_t b, int64_t t) const { return starts && starts[b * time + t]; }

  // n tokens of q, of a decay per key, of v.
  template <class P>
  Rows<P> key_rows(P *p, int64_t b, int64_t begin, int64_t n, int64_t group) const {
    return {p + ((b * time + begin) * groups + group) * keys, groups * keys, n, keys, ahead()};
  }
  template <class P>
  Rows<P> gate_rows(P *p, int64_t b, int64_t begin, int64_t n, int64_t h) const {
    return {p + ((b * time + begin) * heads + h) * keys, heads * keys, n, keys, ahead()};
  }
  template <class P>
  Rows<P> value_rows(P *p, int64_t b, int64_t begin, int64_t n, int64_t h, int64_t lane) const {
    const int64_t many = std::min(lanes, values - lane);
    return {p + ((b * time + begin) * heads + h) * values + lane, heads * values, n, many, ahead()};
  }
  // The lanes of state number i of [... K V]; that of the same head before it is wanted soon where several are kept.
  template <class P>
  Rows<P> state_rows(P *p, int64_t i, int64_t lane, bool kept = false) const {
    return {p + i * keys * values + lane, values, keys, std::min(lanes, values - lane), kept ? -heads * keys : 0};
  }
};

// One pair, with its state or the gradient of that.
struct Item {
  int64_t h, lane, columns;
  Buffer S, u;  // u: the gradient of a bonus
};

// Room for the items of a task: as many as a part of the pairs can hold.
inline std::vector<Item> room_for_items(const Heads &p, int64_t pairs, int64_t parts) {
  return std::vector<Item>(blocks(pairs, parts), Item{0, 0, 0, Buffer(p.width() * p.columns(0)), Buffer(p.width())});
}

// Makes the items pairs number `from` to `to`, with their states of [B H K V].
inline void set_items(const Heads &p, const float *states, int64_t b, int64_t from, int64_t to,
                      std::vector<Item> &items) {
  items.resize(to - from, items[0]);
  for (int64_t i = from; i < to; i++) {
    Item &item = items[i - from];
    item.h = i / p.value_blocks();
    item.lane = i % p.value_blocks() * p.lanes;
    item.columns = p.columns(item.lane);
    read(p.state_rows(states, b * p.heads + item.h, item.lane), item.S, p.width());
    std::fill_n((float *)item.u, p.width(), 0.0f);
  }
}

}  // namespace ev
