//! A daemon that is killed and started again, with the files that it keeps.

use std::path::Path;

use tokio::runtime::Runtime;

use super::*;
use crate::api::{
    changes::{ApplyRequest, Change, Changed, OriginKind, RollbackRequest},
    client::ClientError,
};

/// A daemon whose files stay when it ends.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub fake: Handle,
    pub client: Client,
    pub within: Option<Duration>,
    pub running: Option<(Runtime, watch::Sender<bool>)>,
}

impl Site {
    pub fn new() -> Self {
        let dir = policy_dir(POLICY);
        let client = Client::new(&config(dir.path()).socket);
        let fake = Handle::default();
        fake.lock().outlives = true;
        Self {
            dir,
            fake,
            client,
            within: None,
            running: None,
        }
    }

    pub async fn started() -> Self {
        let mut this = Self::new();
        this.start().await;
        this
    }

    pub async fn start(&mut self) {
        let mut config = config(self.dir.path());
        config.confirm_within = self.within;
        self.start_as(config).await;
    }

    pub async fn start_as(&mut self, config: Config) {
        // Of its own: all its tasks end when it is killed.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let entered = runtime.enter();
        let (_hangup, stop, task) = spawn(config, &self.fake);
        drop(entered);
        self.running = Some((runtime, stop));
        let answers = self.until("it answers", async || self.client.status().await.is_ok());
        tokio::select! {
            () = answers => {}
            ended = task => panic!("{ended:?}"),
        }
    }

    /// As SIGKILL does.
    pub async fn kill(&mut self) {
        let (runtime, _stop) = self.running.take().unwrap();
        let end = move || runtime.shutdown_timeout(Duration::from_secs(10));
        tokio::task::spawn_blocking(end).await.unwrap();
    }

    /// The kernel forgets everything.
    pub fn reboot(&mut self) {
        self.fake = Handle::default();
        self.fake.lock().outlives = true;
    }

    pub async fn restart(&mut self) {
        self.kill().await;
        self.start().await;
    }

    /// Another directory with a policy.
    pub fn other(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("p.yaml"), text).unwrap();
        path
    }

    pub fn edit(&self, text: &str) {
        let new = self.dir.path().join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.dir.path().join("segments/hospital.yaml")).unwrap();
    }

    pub async fn apply(&self, path: &Path, within: Option<u64>) -> Result<Changed, ClientError> {
        let request = ApplyRequest {
            path: path.to_owned(),
            confirm_within: within,
            message: Some("because".to_owned()),
            dry_run: false,
            content: None,
        };
        self.client.apply(&request).await
    }

    pub async fn rollback(&self, to: Option<u64>) -> Result<Changed, ClientError> {
        let request = RollbackRequest {
            to,
            ..RollbackRequest::default()
        };
        self.client.rollback(&request).await
    }

    pub async fn history(&self) -> Vec<Change> {
        self.client.history().await.unwrap().changes
    }

    pub async fn last(&self) -> Change {
        self.history().await.pop().unwrap()
    }

    pub async fn status(&self) -> Status {
        self.client.status().await.unwrap()
    }

    pub async fn origin(&self) -> OriginKind {
        self.status().await.policy.origin.unwrap().kind
    }

    pub async fn until(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds().await {
            assert!(Instant::now() < deadline, "never: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// That kernel, status and names agree that this port is open, and only this.
    pub async fn only(&self, open: u16) {
        for port in [5432, 5433, 5434, 5435] {
            let request = ExplainRequest {
                from: "10.99.3.4".parse().unwrap(),
                to: "10.10.1.5".parse().unwrap(),
                service: format!("tcp/{port}"),
            };
            let verdict = self.client.explain(&request).await.unwrap().verdict;
            let expected = if port == open { "ALLOWED" } else { "DENIED" };
            assert_eq!(verdict, expected, "{port}");
        }
        let judges = format!("{:016x}", self.fake.lock().judges());
        assert_eq!(self.status().await.policy.hash, judges);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some((runtime, _stop)) = self.running.take() {
            runtime.shutdown_background();
        }
    }
}
