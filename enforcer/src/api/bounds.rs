//! What clients may take of the daemon: connections, time, memory. One that asks at once is served,
//! whatever the others do.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::oneshot,
    time::{Sleep, sleep},
};

/// Bytes of a request's line and header.
pub const HEADER: usize = 16 << 10;
/// Lines of a request's header.
pub const HEADER_LINES: usize = 64;
/// Bytes of a request's body.
pub const BODY: usize = 64 << 10;
/// For the header to come, and for the body.
pub const SEND: Duration = Duration::from_secs(5);
/// For a client to take some part of its answer. Not of a stream: nothing may come for days, and
/// its reader may be somebody who scrolls.
pub const TAKE: Duration = Duration::from_secs(30);
/// Connections of one user, and of all, that have not asked for anything yet. The oldest goes when
/// there are more.
pub const WAITING_EACH: usize = 32;
/// … of all.
pub const WAITING: usize = 128;
/// Requests of one user that are being answered.
pub const REQUESTS_EACH: usize = 16;
/// Streams that one user reads.
pub const STREAMS_EACH: usize = 16;
/// Both, of all users but root.
pub const ANSWERED: usize = 256;
/// Requests that are worked on at once; the others wait for their turn.
pub const AT_WORK: usize = 4;

/// Who is connected.
#[derive(Debug, Default)]
pub struct Connections(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    waiting: VecDeque<Waiting>,
    answered: BTreeMap<u32, Answered>,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    uid: u32,
    /// Dropped: the connection is to end.
    hold: oneshot::Sender<()>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Answered {
    requests: usize,
    streams: usize,
}

impl Connections {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection of this user. The receiver ends when it is to make room for another.
    pub fn arrived(self: &Arc<Self>, uid: u32) -> (Place, oneshot::Receiver<()>) {
        let (hold, end) = oneshot::channel();
        let mut table = self.table();
        let id = table.next;
        table.next += 1;
        let of = |table: &Table, uid| table.waiting.iter().filter(|w| w.uid == uid).count();
        if of(&table, uid) >= WAITING_EACH {
            table.remove_oldest(uid);
        } else if table.waiting.len() >= WAITING {
            let users: Vec<u32> = table.waiting.iter().map(|w| w.uid).collect();
            if let Some(most) = users.into_iter().max_by_key(|uid| of(&table, *uid)) {
                table.remove_oldest(most);
            }
        }
        table.waiting.push_back(Waiting { id, uid, hold });
        drop(table);
        let place = Place {
            connections: Arc::clone(self),
            id,
            uid,
            answered: Mutex::new(None),
        };
        (place, end)
    }
}

impl Table {
    fn remove_oldest(&mut self, uid: u32) {
        let oldest = self.waiting.iter().position(|w| w.uid == uid);
        if let Some(oldest) = oldest {
            self.waiting.remove(oldest);
        }
    }
}

/// What an answer is to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Soon over.
    Request,
    /// As long as the client takes.
    Stream,
}

/// A connection's place among the others; free when it is dropped.
#[derive(Debug)]
pub struct Place {
    connections: Arc<Connections>,
    id: u64,
    uid: u32,
    answered: Mutex<Option<(Kind, oneshot::Sender<()>)>>,
}

impl Place {
    /// The whole request is there and is to be answered. False: too many of this user's are, or
    /// it has made room for another.
    pub fn answer(&self, kind: Kind) -> bool {
        let mut table = self.connections.table();
        let all = |a: &Answered| a.requests + a.streams;
        let total: usize = table.answered.values().map(all).sum();
        let own = table.answered.get(&self.uid).copied().unwrap_or_default();
        let full = match kind {
            Kind::Request => own.requests >= REQUESTS_EACH,
            Kind::Stream => own.streams >= STREAMS_EACH,
        };
        if full || (total >= ANSWERED && self.uid != 0) {
            return false;
        }
        let position = table.waiting.iter().position(|w| w.id == self.id);
        let Some(waiting) = position.and_then(|position| table.waiting.remove(position)) else {
            return false;
        };
        let own = table.answered.entry(self.uid).or_default();
        match kind {
            Kind::Request => own.requests += 1,
            Kind::Stream => own.streams += 1,
        }
        let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        *answered = Some((kind, waiting.hold));
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.connections.table();
        let answered = self.answered.get_mut();
        let Some((kind, _)) = answered.unwrap_or_else(PoisonError::into_inner) else {
            table.waiting.retain(|w| w.id != self.id);
            return;
        };
        if let Some(own) = table.answered.get_mut(&self.uid) {
            match kind {
                Kind::Request => own.requests -= 1,
                Kind::Stream => own.streams -= 1,
            }
            if own.requests + own.streams == 0 {
                table.answered.remove(&self.uid);
            }
        }
    }
}

/// A stream whose writes fail when the other end takes nothing for too long.
pub struct Bounded {
    stream: UnixStream,
    limit: Duration,
    patient: Arc<AtomicBool>,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Bounded {
    /// While `patient` is set it waits for ever.
    pub fn new(stream: UnixStream, limit: Duration, patient: Arc<AtomicBool>) -> Self {
        Self {
            stream,
            limit,
            patient,
            stalled: None,
        }
    }

    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() || self.patient.load(Ordering::Relaxed) {
            self.stalled = None;
            return result;
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Says a thing about a user once a minute at most, and how often it was not said.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<BTreeMap<u32, (Instant, u64)>>);

impl Seldom {
    const EVERY: Duration = Duration::from_secs(60);
    /// Users remembered; the others wait for a minute.
    const MOST: usize = 256;

    /// `Some`: say it now, for so many times that were not said.
    pub fn due(&self, uid: u32) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some((last, unsaid)) = said.get_mut(&uid) {
            if now.duration_since(*last) < Self::EVERY {
                *unsaid += 1;
                return None;
            }
            *last = now;
            return Some(std::mem::take(unsaid));
        }
        if said.len() >= Self::MOST {
            said.retain(|_, (last, _)| now.duration_since(*last) < Self::EVERY);
        }
        if said.len() >= Self::MOST {
            return None;
        }
        said.insert(uid, (now, 0));
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_the_one_with_the_most_makes_room() {
        let all = Arc::new(Connections::default());
        let ended = |end: &mut oneshot::Receiver<()>| {
            matches!(end.try_recv(), Err(oneshot::error::TryRecvError::Closed))
        };
        let (_place, mut other) = all.arrived(1);
        let mut mine: Vec<_> = (0..WAITING_EACH).map(|_| all.arrived(7)).collect();
        assert!(!ended(&mut mine[0].1));
        let (new, mut end) = all.arrived(7);
        assert!(ended(&mut mine[0].1));
        assert!(!ended(&mut mine[1].1) && !ended(&mut other) && !ended(&mut end));
        // Many users together.
        let many: Vec<_> = (100..200).map(|uid| all.arrived(uid)).collect();
        assert!(ended(&mut mine[1].1) && !ended(&mut other) && !ended(&mut end));
        assert!(all.table().waiting.len() <= WAITING);
        drop((many, mine));
        assert_eq!(all.table().waiting.len(), 2);
        // One that is being answered is not ended for others.
        assert!(new.answer(Kind::Request));
        let more: Vec<_> = (0..2 * WAITING_EACH).map(|_| all.arrived(7)).collect();
        assert!(!ended(&mut end));
        drop((more, new));
        assert!(all.table().answered.is_empty());
    }

    #[test]
    fn a_user_has_a_share_of_answers() {
        let all = Arc::new(Connections::default());
        let take = |uid, kind| {
            let place = all.arrived(uid).0;
            place.answer(kind).then_some(place)
        };
        let streams: Vec<_> = (0..STREAMS_EACH).map(|_| take(7, Kind::Stream)).collect();
        assert!(streams.iter().all(Option::is_some));
        assert!(take(7, Kind::Stream).is_none());
        assert!(take(7, Kind::Request).is_some());
        assert!(take(8, Kind::Stream).is_some());
        let crowd: Vec<_> = (100..)
            .map(|uid| take(uid, Kind::Request))
            .take_while(Option::is_some)
            .collect();
        assert_eq!(crowd.len() + STREAMS_EACH, ANSWERED);
        assert!(take(0, Kind::Request).is_some());
        drop(streams);
        assert!(take(7, Kind::Stream).is_some());
    }

    #[tokio::test]
    async fn who_takes_nothing_is_cut_off_and_who_takes_slowly_is_not() {
        use tokio::{
            io::{AsyncReadExt as _, AsyncWriteExt as _},
            time::timeout,
        };
        let limit = Duration::from_millis(100);
        let patient = Arc::new(AtomicBool::new(false));
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut bounded = Bounded::new(here, limit, Arc::clone(&patient));
        let bytes = vec![0; 1 << 20];
        let slow = async {
            // As much as the kernel wants taken before more may come.
            let mut buffer = vec![0; 200 << 10];
            for _ in 0..4 {
                there.read_exact(&mut buffer).await.unwrap();
                sleep(limit / 2).await;
            }
            std::future::pending::<()>().await;
        };
        let start = Instant::now();
        let error = tokio::select! {
            result = bounded.write_all(&bytes) => result.unwrap_err(),
            () = slow => unreachable!(),
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() >= limit * 2, "{:?}", start.elapsed());
        // Streams wait.
        patient.store(true, Ordering::Relaxed);
        let waits = timeout(limit * 3, bounded.write_all(&bytes)).await;
        assert!(waits.is_err());
    }

    #[test]
    fn a_thing_is_said_once_a_minute_and_user() {
        let seldom = Seldom::default();
        assert_eq!(seldom.due(1), Some(0));
        assert_eq!(seldom.due(1), None);
        assert_eq!(seldom.due(2), Some(0));
        let said = (0..10_000).filter(|uid| seldom.due(*uid).is_some()).count();
        assert!(said < Seldom::MOST);
    }
}
