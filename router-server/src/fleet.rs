//! All pools and all links of a router: which name is served by which pool, and who may join it.
//!
//! Knows what is announced; does not know what the workers do.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use router_core::{DecisionId, WorkerLoad};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::dispatch::{Batch, Command, Decided, Figures, Seat};
use crate::error::Error;
use crate::link;
use crate::metrics::Metrics;
use crate::pool::{Files, Pool, PoolConfig};
use crate::proto::worker_status::State;
use crate::proto::{WorkerInfo, WorkerStatus};

/// How long a worker lets those named before it go first.
const FIRST_TURN: Duration = Duration::from_millis(500);

/// Pools by served name, links by URL.
pub struct Fleet {
    config: PoolConfig,
    /// Where the numbers go.
    pub metrics: Arc<Metrics>,
    pools: Mutex<BTreeMap<String, Arc<Pool>>>,
    links: Mutex<Vec<(Arc<Link>, JoinHandle<()>)>>,
    /// Held while a pool is made, so that two workers that come together do not make two.
    founding: tokio::sync::Mutex<()>,
}

/// What is known of one worker's address.
pub struct Link {
    /// Where it is dialled.
    pub url: String,
    seen: Mutex<Seen>,
    /// Its first attempt is over, well or not.
    tried: watch::Sender<bool>,
}

/// The latest of a link.
#[derive(Clone, Default)]
pub struct Seen {
    /// Connecting, refused, or in a pool.
    pub state: State,
    /// Why, where that is not plain.
    pub detail: String,
    /// What the worker announced last.
    pub info: Option<WorkerInfo>,
    /// Its place, while its session is open.
    pub seat: Option<(Arc<Pool>, Seat)>,
}

/// What a worker's announcement means.
pub enum Admission {
    /// It joins this pool.
    Join(Arc<Pool>),
    /// It is the first of its model.
    Found,
    /// It differs from the pool of that name: how.
    Differs(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// The latest.
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Notes that its first attempt is over.
    pub fn tried(&self) {
        self.tried.send_replace(true);
    }

    /// Notes a change.
    pub fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut lock(&self.seen));
    }
}

impl Fleet {
    /// Without pools and links.
    pub fn new(config: PoolConfig, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            config,
            metrics,
            pools: Mutex::default(),
            links: Mutex::default(),
            founding: tokio::sync::Mutex::default(),
        })
    }

    /// Dials a worker for as long as the fleet lives, or until it is removed.
    pub fn add(self: &Arc<Self>, url: String) {
        let seen = Mutex::new(Seen { state: State::Connecting, ..Seen::default() });
        let link = Arc::new(Link { url, seen, tried: watch::Sender::new(false) });
        let task = tokio::spawn(link::run(Arc::clone(&link), Arc::clone(self)));
        lock(&self.links).push((link, task));
    }

    /// Ends the link of a URL.
    pub fn remove(&self, url: &str) {
        lock(&self.links).retain(|(link, task)| {
            if link.url == url {
                task.abort();
            }
            link.url != url
        });
    }

    /// Ends all links.
    pub fn close(&self) {
        lock(&self.links).drain(..).for_each(|(_, task)| task.abort());
    }

    fn links(&self) -> Vec<Arc<Link>> {
        lock(&self.links).iter().map(|(link, _)| Arc::clone(link)).collect()
    }

    /// The pool of a model name.
    pub fn pool(&self, name: &str) -> Result<Arc<Pool>, Error> {
        let pools = lock(&self.pools);
        match pools.get(name) {
            Some(pool) if pool.is_alive() => Ok(Arc::clone(pool)),
            Some(_) => Err(Error::NoWorker),
            // Before any worker came nobody knows what is served.
            None if pools.is_empty() => Err(Error::NoWorker),
            None => Err(Error::UnknownModel(name.to_owned())),
        }
    }

    /// All pools, each with one of its names, in the order of names.
    pub fn pools(&self) -> Vec<(String, Arc<Pool>)> {
        lock(&self.pools).iter().map(|(name, pool)| (name.clone(), Arc::clone(pool))).collect()
    }

    /// Each pool once.
    fn each_pool(&self) -> Vec<Arc<Pool>> {
        let mut pools: Vec<Arc<Pool>> = Vec::new();
        for (_, pool) in self.pools() {
            if !pools.iter().any(|known| Arc::ptr_eq(known, &pool)) {
                pools.push(pool);
            }
        }
        pools
    }

    /// Whether some worker takes requests.
    pub fn is_ready(&self) -> bool {
        lock(&self.pools).values().any(|pool| pool.state.ready() > 0 && pool.is_alive())
    }

    /// Where a worker belongs.
    pub fn admit(&self, link: &Link, info: &WorkerInfo, model: &router_core::ModelSpec) -> Admission {
        let twin = self.links().into_iter().find(|other| {
            let seen = other.seen();
            let same =
                |theirs: &WorkerInfo| theirs.worker_id == info.worker_id && theirs.worker_epoch == info.worker_epoch;
            !std::ptr::eq(other.as_ref(), link) && seen.seat.is_some() && seen.info.as_ref().is_some_and(same)
        });
        if let Some(twin) = twin {
            return Admission::Differs(format!("the same worker is linked already: {}", twin.url));
        }
        let pools = lock(&self.pools);
        let Some(pool) = info.served_names.iter().find_map(|name| pools.get(name)) else {
            return Admission::Found;
        };
        let mut names = info.served_names.clone();
        names.sort_unstable();
        names.dedup();
        let difference = match pool.model.check(model) {
            Err(mismatch) => Some(mismatch.to_string()),
            Ok(()) if names != pool.names => {
                Some(format!("served names differ from the pool's: {names:?}\nthe pool has {:?}", pool.names))
            }
            Ok(()) => None,
        };
        match difference {
            None if pool.is_alive() => Admission::Join(Arc::clone(pool)),
            // A pool that nobody is in any more does not hold its name against a new model.
            Some(difference) if pool.is_alive() && pool.state.members() > 0 => Admission::Differs(difference),
            _ => Admission::Found,
        }
    }

    /// The turn to make pools; ask [`Fleet::admit`] again under it. Of workers that are there, the one that was named
    /// first makes the pool, so that it is not chance which of two that differ is refused.
    pub async fn founding(&self, link: &Link) -> tokio::sync::MutexGuard<'_, ()> {
        let links = self.links();
        let earlier = links.iter().take_while(|other| !std::ptr::eq(other.as_ref(), link));
        let wait = async {
            for other in earlier {
                let mut tried = other.tried.subscribe();
                // An error means that the link is gone.
                let _ = tried.wait_for(|tried| *tried).await;
            }
        };
        let _ = tokio::time::timeout(FIRST_TURN, wait).await;
        self.founding.lock().await
    }

    /// Makes the pool of a worker that is the first of its model.
    pub async fn found(
        &self,
        info: &WorkerInfo,
        model: router_core::ModelSpec,
        files: Files,
    ) -> Result<Arc<Pool>, String> {
        let mut names = info.served_names.clone();
        names.sort_unstable();
        names.dedup();
        let (config, metrics) = (self.config.clone(), Arc::clone(&self.metrics));
        let start = move || Pool::start(names, model, &files, &config, metrics);
        let pool = tokio::task::spawn_blocking(start).await.map_err(|error| error.to_string())??;
        let mut pools = lock(&self.pools);
        let old = pools.values().filter(|old| old.names.iter().any(|name| pool.names.contains(name)));
        for old in old.cloned().collect::<Vec<_>>() {
            pools.retain(|_, kept| !Arc::ptr_eq(kept, &old));
            let _ = old.commands.try_send(Command::Close);
        }
        for name in &pool.names {
            pools.insert(name.clone(), Arc::clone(&pool));
        }
        Ok(pool)
    }

    /// The name a worker has in listings and metrics: its own, or a longer one where another has that already.
    pub fn name_for(&self, link: &Link, info: &WorkerInfo) -> String {
        let taken = self.links().iter().any(|other| {
            let seen = other.seen();
            !std::ptr::eq(other.as_ref(), link)
                && seen.seat.is_some()
                && seen.info.is_some_and(|theirs| theirs.worker_id == info.worker_id)
        });
        if taken { format!("{}@{}", info.worker_id, link.url) } else { info.worker_id.clone() }
    }

    /// What the cores believe of all workers.
    pub async fn loads(&self) -> Vec<WorkerLoad> {
        let mut all = Vec::new();
        for pool in self.each_pool() {
            all.extend(pool.loads().await);
        }
        all
    }

    /// The latest decisions of all pools: all of them, or those of this number.
    pub async fn decisions(&self, wanted: Option<DecisionId>) -> Vec<Decided> {
        let mut all = Vec::new();
        for pool in self.each_pool() {
            all.extend(pool.decisions(wanted).await);
        }
        all
    }

    /// The latest batches of all pools.
    pub async fn batches(&self) -> Vec<Batch> {
        let mut all = Vec::new();
        for pool in self.each_pool() {
            all.extend(pool.batches().await);
        }
        all
    }

    /// One name of each pool and its figures, as they were when the loads were asked for last.
    pub fn figures(&self) -> Vec<(String, Figures)> {
        let pools = self.each_pool().into_iter();
        pools.map(|pool| (pool.names.first().cloned().unwrap_or_default(), pool.state.figures())).collect()
    }

    /// All links with what is known of their workers.
    pub async fn statuses(&self) -> Vec<WorkerStatus> {
        let mut loads: HashMap<usize, Vec<WorkerLoad>> = HashMap::new();
        for pool in self.each_pool() {
            loads.insert(Arc::as_ptr(&pool).addr(), pool.loads().await);
        }
        let status = |link: Arc<Link>| {
            let seen = link.seen();
            let load = seen.seat.as_ref().and_then(|(pool, seat)| {
                loads.get(&Arc::as_ptr(pool).addr())?.iter().find(|load| load.worker == seat.worker)
            });
            let mut status = WorkerStatus {
                info: seen.info,
                url: link.url.clone(),
                state: seen.state.into(),
                detail: seen.detail,
                ..WorkerStatus::default()
            };
            if let Some(load) = load {
                let state = if load.ready { State::Ready } else { State::Connecting };
                status.state = state.into();
                status.queued_tokens = load.queued.0;
                status.batch_size = load.batch_size;
                status.running_rows = load.running_rows;
                status.held_rows = load.held_rows;
                status.running_blocks = load.running_blocks.0;
                status.held_blocks = load.held_blocks.0;
                status.indexed_blocks = load.indexed.0;
                status.work_us = load.work.0;
            }
            status
        };
        self.links().into_iter().map(status).collect()
    }
}
