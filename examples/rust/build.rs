//! Finds libgqa_kernels.so and its header: in `GQA_KERNELS_DIR`, the folder of the installed package, or by asking
//! `python3 -m gqa_kernels` (`PYTHON` names another interpreter).

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn package_folder() -> PathBuf {
    if let Some(folder) = env::var_os("GQA_KERNELS_DIR") {
        return folder.into();
    }
    let python = env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let code = "import gqa_kernels, pathlib; print(pathlib.Path(gqa_kernels.__file__).parent)";
    let done = Command::new(&python).args(["-c", code]).output();
    match done {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().into(),
        _ => panic!("{python} cannot import gqa_kernels: install the package, or set GQA_KERNELS_DIR to its folder"),
    }
}

fn main() {
    let folder = package_folder();
    let shown = folder.display();
    println!("cargo:rustc-link-search=native={shown}");
    println!("cargo:rustc-link-lib=dylib=gqa_kernels");
    println!("cargo:rustc-link-lib=dylib=dl");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{shown}");
    println!("cargo:rustc-env=GQA_KERNELS_INCLUDE={}", folder.join("include").display());
    println!("cargo:rerun-if-env-changed=GQA_KERNELS_DIR");
    println!("cargo:rerun-if-env-changed=PYTHON");
}
