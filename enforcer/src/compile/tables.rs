//! The hash tables of an image, and where they stand in it.

use std::sync::Arc;

use enforcer_common::image::{self as layout, EMPTY, header};

use super::{
    known::Content,
    quarters,
    rows::Rows,
    table::{self, Keys, Placed},
    word,
    writer::{Full, Writer},
};

/// The hash tables of an image.
pub(super) struct Tables<'a> {
    pub(super) hosts4: &'a [(u32, u32)],
    pub(super) hosts6: &'a [(u128, u32)],
    pub(super) nets6: &'a [(u64, u32)],
    /// With the exceptions.
    pub(super) rows: &'a Arc<Rows>,
    /// Where their timelines are.
    pub(super) timelines: u32,
}

impl Tables<'_> {
    /// Words that the tables take, at least.
    pub(super) fn size(&self) -> usize {
        self.hosts4.len() * layout::V4_HOST_WORDS as usize
            + self.hosts6.len() * layout::V6_HOST_WORDS as usize
            + self.nets6.len() * layout::V6_NET_WORDS as usize
            + self.rows.exceptions().len() * layout::EXCEPTION_WORDS as usize
    }

    pub(super) fn place(&self, known: Option<&Content>) -> Option<(u64, Vec<Arc<Placed>>)> {
        let before = |table: usize, same: &dyn Fn(&Content) -> bool| {
            let known = known.filter(|known| same(known))?;
            Some((known.seed, known.placed.get(table)?))
        };
        let exceptions = self.rows.exceptions();
        table::place(&[
            Keys {
                count: self.hosts4.len(),
                hash: &|key, seed| layout::hash_v4(self.hosts4[key].0, seed),
                known: before(0, &|known| keys(&known.tries.hosts4).eq(keys(self.hosts4))),
            },
            Keys {
                count: self.hosts6.len(),
                hash: &|key, seed| {
                    let address = self.hosts6[key].0;
                    layout::hash_v6((address >> 64) as u64, address as u64, seed)
                },
                known: before(1, &|known| keys(&known.tries.hosts6).eq(keys(self.hosts6))),
            },
            Keys {
                count: self.nets6.len(),
                hash: &|key, seed| layout::hash_net(self.nets6[key].0, seed),
                known: before(2, &|known| keys(&known.tries.nets6).eq(keys(self.nets6))),
            },
            Keys {
                count: exceptions.len(),
                hash: &|key, seed| {
                    let exception = &exceptions[key];
                    layout::hash_exception(exception.row, exception.service, seed)
                },
                known: before(3, &|known| Arc::ptr_eq(&known.rows, self.rows)),
            },
        ])
    }

    pub(super) fn write(&self, placed: &[Arc<Placed>], writer: &mut Writer) -> Result<(), Full> {
        let [hosts4, hosts6, nets6, exceptions] = placed else {
            return Ok(());
        };
        // What an empty slot holds is true wherever it is found.
        let (first4, first6) = (self.hosts4.first(), self.hosts6.first());
        slots(writer, header::V4_HOSTS, hosts4, |key| {
            let host = self.hosts4.get(key as usize).or(first4);
            host.map_or([0, 0], |(address, class)| [*address, *class])
        })?;
        slots(writer, header::V6_HOSTS, hosts6, |key| {
            let host = self.hosts6.get(key as usize).or(first6);
            host.map_or([0; 5], |(address, class)| {
                let [a, b, c, d] = quarters(*address);
                [a, b, c, d, *class]
            })
        })?;
        let first = self.nets6.first();
        slots(writer, header::V6_NETS, nets6, |key| {
            let net = self.nets6.get(key as usize).or(first);
            net.map_or([0; 4], |(hi, class)| {
                [(hi >> 32) as u32, *hi as u32, *class, 0]
            })
        })?;
        slots(writer, header::EXCEPTIONS, exceptions, |key| {
            let exception = self.rows.exceptions().get(key as usize);
            exception.map_or([EMPTY, EMPTY, 0, 0], |e| e.words(self.timelines))
        })
    }
}

/// What a table finds its values by.
fn keys<K: Copy>(table: &[(K, u32)]) -> impl Iterator<Item = K> {
    table.iter().map(|(key, _)| *key)
}

/// Writes a table's pilots, each slot's words, and where they are. `slot` is asked with [`EMPTY`], no
/// key's index, where there is none.
fn slots<const N: usize>(
    writer: &mut Writer,
    table: u32,
    placed: &Placed,
    slot: impl Fn(u32) -> [u32; N],
) -> Result<(), Full> {
    if placed.slots.is_empty() {
        return Ok(());
    }
    let pilots = writer.append_aligned(&placed.pilots)?;
    let words = placed.slots.iter().flat_map(|key| slot(*key));
    let at = writer.append_each(placed.slots.len() * N, words)?;
    let described = [
        pilots,
        word(placed.pilots.len()),
        at,
        word(placed.slots.len()),
    ];
    for (index, value) in (table..).zip(described) {
        writer.set(index, value);
    }
    Ok(())
}
